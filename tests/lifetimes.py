"""One rank of test_resources.py: ``python lifetimes.py JOB TRANSPORT FOLDER``.

FOLDER is where UCX makes its segments of shared memory.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.buffer import Buffer
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.memory import MemoryRegion
from ucxgossip.ucp.worker import Worker

TIMEOUT_S = 60.0


def join() -> ug.Group:
    return ug.join(transport=sys.argv[2], timeout=TIMEOUT_S, settings={"POSIX_DIR": sys.argv[3]})


def forgets() -> None:
    """Ends without close(), a round of its own just over, the engine thread at work."""
    group = join()
    group.exchange(np.zeros(100_000, np.float32))
    if group.rank == 0:
        sys.stdin.read()  # until the others have ended: the store is here
    print("exchanged")


def waits() -> None:
    """Rank 0 waits for a round of rank 1's, who never comes; rank 1 waits for news only."""
    try:
        with join() as group:
            array = np.zeros(100_000, np.float32)
            group.exchange(array)
            group.agree("ready", {})
            if group.rank == 0:
                print("waiting", flush=True)
                for _ in range(3):
                    group.exchange(array)
            else:
                print("elsewhere", flush=True)
                group.agree("never", {})
    except (KeyboardInterrupt, errors.PeerError) as error:
        print(f"{type(error).__name__}: {error}".removesuffix(": "))


def terminated() -> None:
    """As `waits`, with SIGTERM made an ordinary exit."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    waits()


def attached(group: ug.Group) -> tuple[torch.nn.Module, torch.optim.Optimizer, ug.Gossip]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, ug.attach(model, optimizer, group)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def in_child(body: Callable[[], None]) -> int:
    """Run `body` in a forked child, which then exits as a program does; its exit status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
        sys.exit(7)
    signal.alarm(int(TIMEOUT_S))
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status)


def refused(use: Callable[[], object]) -> None:
    try:
        use()
    except errors.ForkError as error:
        assert "spawn" in str(error), error
        return
    raise AssertionError("a forked child could use what its parent made")


def child_uses() -> None:
    """Every use in a child is refused; whatever it closes, the parent's job goes on."""
    with join() as group:
        model, optimizer, gossip = attached(group)
        box, array = group.mailbox(64), np.zeros(8)
        region = MemoryRegion(group.context, nbytes=64)
        buffer = Buffer.of(array)
        step(model, optimizer, torch.ones(4, 20))  # its last round is under way still
        uses: list[Callable[[], object]] = [
            lambda: group.exchange(array),
            lambda: group.mailbox(8),
            lambda: group.allocate(8),
            lambda: group.agree("x", {}),
            lambda: group.share("x", b"", lambda blobs: b""),
            lambda: group.wait(box),
            lambda: group.post(box, buffer, buffer, ug.Round(1, 1)),
            lambda: group.engine.connect(group.rank, b""),
            lambda: group.engine.wait(box, 1.0),
            lambda: group.engine.flush(1.0),
            lambda: group.engine.worker.progress(),
            lambda: group.context.handle,
            lambda: region.pack(),
            lambda: Worker(group.context),
            lambda: Context("tcp"),
            lambda: ug.join(0, 1),
            lambda: step(model, optimizer, torch.ones(4, 20)),
            lambda: gossip.wait(),
            lambda: gossip.synchronize(),
            lambda: attached(group),
        ]

        def body() -> None:
            for use in uses:
                refused(use)
            for _ in range(2):
                gossip.detach()
                region.close()
                group.engine.close()
                group.context.close()
                group.abort("in a child")
                group.close()
            assert group.closed and group.context.closed and region.closed
            step(model, optimizer, torch.ones(4, 20))  # its own copy, plain again

        assert in_child(body) == 7
        go_on(group, model, optimizer, gossip)


def go_on(
    group: ug.Group, model: torch.nn.Module, optimizer: torch.optim.Optimizer, gossip: ug.Gossip
) -> None:
    """The parent's job is whole."""
    for _ in range(5):
        step(model, optimizer, torch.ones(4, 20))
    gossip.synchronize()
    assert gossip.consensus_distance() < 1e-5
    array = np.full(1000, float(group.rank))
    group.exchange(array)
    assert (array == 0.5).all()
    gossip.detach()


def child_exits() -> None:
    """Children that end in every way, with all that they inherited, in the middle of rounds."""
    with join() as group:
        model, optimizer, gossip = attached(group)

        def leaves_by_exception() -> None:
            try:
                with gossip, group:
                    raise SystemExit(3)
            except SystemExit:
                return

        def leaves_with() -> None:
            with gossip, group:
                pass

        for body in (lambda: None, leaves_with, leaves_by_exception, lambda: os._exit(7)):
            step(model, optimizer, torch.ones(4, 20))
            assert in_child(body) == 7
        children = multiprocessing.get_context("fork")
        child: Any = children.Process(target=leaves_with)
        child.start()
        child.join(TIMEOUT_S)
        assert child.exitcode == 0
        go_on(group, model, optimizer, gossip)


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that each worker computes."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((20,), float(index))


def loader() -> None:
    """A DataLoader with forked workers, the default on Linux, feeds an attached model."""
    with join() as group:
        model, optimizer, gossip = attached(group)
        for keep in (False, True):
            batches = torch.utils.data.DataLoader(
                Samples(),
                batch_size=4,
                num_workers=2,
                multiprocessing_context="fork",
                persistent_workers=keep,
            )
            for _ in range(2):
                seen = 0
                for x in gossip.shuffled(batches):
                    step(model, optimizer, x)
                    seen += len(x)
                assert seen == 32, seen
            del batches
        go_on(group, model, optimizer, gossip)


def before_and_after() -> None:
    """A child forked before join(), or after close(), joins a job of its own."""

    def own() -> None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        with join() as group:
            array = np.ones(4)
            group.exchange(array)
            group.mailbox(1 << 16)

    assert in_child(own) == 7
    with join() as group:
        group.exchange(np.zeros(4))
    assert in_child(own) == 7


JOBS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (forgets, waits, terminated, child_uses, child_exits, loader, before_and_after)
}


def main() -> None:
    assert Path(sys.argv[3]).is_dir()
    torch.set_num_threads(1)
    JOBS[sys.argv[1]]()
    if sys.argv[1] in ("child_uses", "child_exits", "loader", "before_and_after"):
        print("well", flush=True)


if __name__ == "__main__":
    main()
