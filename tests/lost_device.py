"""As lost.py, for arrays on a device: ``python lost_device.py TRANSPORT LOSSES``.

GOSSIP_TEST_DEVICE: ``cuda``, or the fake device of the other tests.
"""

import json
import logging
import os
import sys
import time

import numpy as np

import gpu_ranks
import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.mixing import HELD_LANES, Collective, DeviceArray, DeviceHeld, DeviceInPlace, Meter

AFTER = 40
DEADLINE_S = 60.0


def main() -> None:
    transport, losses = sys.argv[1], int(sys.argv[2])
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="log %(message)s")
    end: dict[str, object] = {}
    tuning = ug.Tuning(chunk=1 << 17)
    with ug.join(transport=transport, timeout=DEADLINE_S, dead_after=2.0, tuning=tuning) as group:
        try:
            rounds(group, losses, end)
        except errors.ExpelledError as error:
            end["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(end), flush=True)


def rounds(group: ug.Group, losses: int, end: dict[str, object]) -> None:
    """Rounds of two arrays and now and again an exact mean, whoever is lost."""
    device = gpu_ranks.open_device(os.environ.get("GOSSIP_TEST_DEVICE", "fake"))
    schedule, meter = ug.Rotated(ug.Dissemination(group.size), seed=0), Meter()
    arrays = []
    for values in (np.full(16, float(group.rank)), np.full(300_000, group.rank, np.float32)):
        memory = device.allocate(values.nbytes)
        arrays.append(DeviceArray(device, memory, values.dtype, len(values)))
        arrays[-1].write(values)
    streams = [
        DeviceInPlace(group, arrays[0], schedule, meter),
        DeviceHeld(group, arrays[1], schedule, meter, lanes=HELD_LANES),
    ]
    for stream in streams:
        stream.begin()
    collective = Collective(group)
    deadline, left, known, number = time.monotonic() + DEADLINE_S, AFTER, 0, 0
    while left:
        streams[0].post()
        streams[1].settle()
        streams[1].post()
        streams[0].wait()
        number += 1
        if number == 10:
            print("going", flush=True)
        if number % 5 == 0:
            least = collective.table(np.array([len(group.losses)], np.int64))
            known_to_all = int(min(least[rank, 0] for rank in group.members))
            if known_to_all > known:
                known = known_to_all
                print(f"lost {[loss.rank for loss in group.losses]}", flush=True)
            left = left - 5 if known >= losses else left
        if time.monotonic() > deadline:
            raise AssertionError(f"no {losses} losses within {DEADLINE_S} s")
    for stream in streams:
        stream.finish()
    mean = np.array([float(group.rank)])
    collective.average(mean)
    found = [each.read() for each in arrays]
    end.update(
        rank=group.rank,
        members=list(group.members),
        epoch=group.epoch,
        lost=[loss.rank for loss in group.losses],
        mean=float(mean[0]),
        within=all(bool(((each >= 0) & (each <= group.size - 1)).all()) for each in found),
        flat=all(float(np.ptp(each)) < 1e-3 for each in found),
        intact=all(box.intact() for stream in streams for box in stream.lanes.mailboxes),
    )
    check = getattr(device, "check", None)
    if check is not None:
        check()


if __name__ == "__main__":
    main()
