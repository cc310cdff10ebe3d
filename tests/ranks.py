"""One rank of test_spawn.py: ``python ranks.py JOB TRANSPORT``; rank 0 prints what it found."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.buffer import Buffer

CANARY = 0x5C
ROUNDS = 40


def rounds(group: ug.Group) -> dict[str, object]:
    """Rounds of several sizes against a simulation of all ranks, with canaries around."""
    schedule = ug.Rotated(ug.Dissemination(group.size), seed=1)
    wrong = 0
    for count in (1, 1000, 50_000, 700_001):
        box = group.mailbox(4 * count)
        values = np.random.default_rng(count).standard_normal((group.size, count), np.float32)
        raw = np.full(4 * count + 128, CANARY, np.uint8)
        mine = raw[64:-64].view(np.float32)
        mine[:] = values[group.rank]
        for step in range(max(4, ROUNDS // (1 + count // 1000))):
            group.exchange(mine, schedule=schedule, mailbox=box)
            senders = [schedule.round(rank, step).sender for rank in range(group.size)]
            values = values + np.float32(0.5) * (values[senders] - values)
            wrong += not np.array_equal(mine, values[group.rank])
        wrong += not (raw[:64] == CANARY).all() or not (raw[-64:] == CANARY).all()
        wrong += not box.intact()
    return {"wrong": int(wrong)}


def verified(group: ug.Group) -> dict[str, object]:
    """The same with checksums."""
    return rounds(group)


def many(group: ug.Group) -> dict[str, object]:
    """Many small rounds: more ranks than cores must not collapse."""
    array = np.full(2, float(group.rank), np.float32)
    for _ in range(2000):
        group.exchange(array)
    return {"spread": float(abs(array[0] - (group.size - 1) / 2))}


def idle(group: ug.Group) -> dict[str, object]:
    """Rank 0 stays away while the others put to it; its engine thread alone takes what comes."""
    box = group.mailbox(1 << 16)
    array = np.full(1 << 14, float(group.rank), np.float32)
    buffer = Buffer.of(array)
    here, there = (ug.Dissemination(2).round(group.rank, step) for step in (0, 2))
    group.post(box, buffer, buffer, here, there)
    if group.rank:
        group.wait(box)
        group.agree("put", {})
    else:
        group.agree("put", {})  # returns only when rank 1's round has ended
        deadline = time.monotonic() + 30.0
        while group.engine.active(box) and time.monotonic() < deadline:
            os.sched_yield()
        return {"ended": not group.engine.active(box), "value": float(array[0])}
    return {}


def push_sum(group: ug.Group) -> dict[str, object]:
    """Ranks that put at their own pace and wait for nobody: masses and mean come out even."""
    from ucxgossip.mixing import Collective, Meter, PushSum
    from ucxgossip.mixing.stream import array_of, registered

    count, collective, meter = 100_000, Collective(group), Meter()
    buffer = registered(group, count, np.dtype(np.float64))
    values = np.random.default_rng(3).standard_normal((group.size, count))
    array_of(buffer)[:] = values[group.rank]
    stream = PushSum(group, buffer, ug.Dissemination(group.size), meter, collective)
    for _ in range(50 * (1 + group.rank % 3)):
        stream.post()
    stream.finish()
    mass = np.array([stream.mass])
    collective.average(mass)
    before = [edge.mailbox.intact() for edge in stream.edges]
    stream.average(collective)
    wrong = float(np.abs(stream.array - values.mean(axis=0)).max())
    return {"mass": round(float(mass[0]), 9), "right": wrong < 1e-10, "intact": all(before)}


def killed(group: ug.Group) -> dict[str, object]:
    """Rank 1 is killed in mid-job; the others fail by their deadline, by name."""
    array = np.zeros(1000, np.float32)
    group.exchange(array)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.timeout = 2.0
    try:
        for _ in range(10):
            group.exchange(array)
    except (errors.ExchangeError, errors.UCXError) as error:
        return {"error": type(error).__name__}
    return {"error": None}


JOBS: dict[str, Callable[[ug.Group], dict[str, object]]] = {
    each.__name__: each for each in (rounds, verified, many, idle, push_sum, killed)
}


def main() -> None:
    job, transport = sys.argv[1:3]
    with ug.join(transport=transport, timeout=60.0, verify=job == "verified") as group:
        found = JOBS[job](group)
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
