"""One rank of test_lost_ranks.py: ``python lost.py TRANSPORT LOSSES``.

Exchanges until LOSSES ranks are lost and GOSSIP_TEST_AFTER rounds more. Prints `going`, `lost
[RANKS]` as it happens, and at the end JSON: what is left, and the error if there was one.
"""

import json
import logging
import os
import sys
import time

import numpy as np

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.mixing import Collective

AFTER = int(os.environ.get("GOSSIP_TEST_AFTER", "40"))
DEADLINE_S = 60.0


def main() -> None:
    transport, losses = sys.argv[1], int(sys.argv[2])
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="log %(message)s")
    end: dict[str, object] = {}
    # The large array goes through a ring of three chunks: of ten, that are put, or of nineteen,
    # that over TCP are messages.
    tuning = ug.Tuning(chunk=1 << 17, ring=3)
    if losses > 1:
        tuning = ug.Tuning(chunk=1 << 16, ring=3, answers=True)
    try:
        with ug.join(
            transport=transport, timeout=DEADLINE_S, dead_after=2.0, tuning=tuning
        ) as group:
            rounds(group, losses, end)
    except errors.ExpelledError as error:
        end["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(end), flush=True)


def rounds(group: ug.Group, losses: int, end: dict[str, object]) -> None:
    """Rounds of two sizes and now and again an exact mean, whoever is lost."""
    small = np.full(16, float(group.rank))
    large = np.full(300_000, float(group.rank), np.float32)
    boxes = [group.mailbox(array.nbytes, ring=True) for array in (small, large)]
    assert [box.layout.ring for box in boxes] == [False, True]
    collective = Collective(group)
    deadline, left, known, number = time.monotonic() + DEADLINE_S, AFTER, 0, 0
    while left:
        for array, box in zip((small, large), boxes, strict=True):
            group.exchange(array, mailbox=box)
        number += 1
        if number == 10:
            print("going", flush=True)
        # Ranks notice a loss in different rounds, and must stop after the same one.
        if number % 5 == 0:
            least = collective.table(np.array([len(group.losses)], np.int64))
            known_to_all = int(min(least[rank, 0] for rank in group.members))
            if known_to_all > known:
                known = known_to_all
                print(f"lost {[loss.rank for loss in group.losses]}", flush=True)
            left = left - 5 if known >= losses else left
        if time.monotonic() > deadline:
            raise AssertionError(f"no {losses} losses within {DEADLINE_S} s")
    mean = np.array([float(group.rank)])
    collective.average(mean)
    end.update(
        rank=group.rank,
        members=list(group.members),
        epoch=group.epoch,
        lost=[loss.rank for loss in group.losses],
        mean=float(mean[0]),
        within=bool((small >= 0).all() and (small <= group.size - 1).all()),
        flat=bool((large == large[0]).all()),
        intact=all(box.intact() for box in boxes),
    )


if __name__ == "__main__":
    main()
