"""`ucxgossip bench exchange`: one whole round, put and in-place mean, beside the peers' and floors.

Each job of `ranks` processes runs ours and every peer in the same processes, in turn, size by
size, so that a figure and the one beside it saw the same machine. A repeat is a block of rounds
between two barriers; its time is that of the slowest rank, divided by the rounds. The peers are
what people use in our place (gloo, Open MPI); the floors are what the machine can do at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ucxgossip.bench import mpirun, plot
from ucxgossip.bench.arguments import at_least_one, positive
from ucxgossip.bench.pair import check_device
from ucxgossip.bench.payloads import Payload
from ucxgossip.bench.report import Report
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column
from ucxgossip.errors import ArgumentError, BenchError

MPI_PEERS = ("mpi_allreduce", "mpi_gossip", "mpi_put")
FLOORS = ("sockets", "copy")
ONE_ARRAY = "one_array"
FIXED = "fixed"
PEERS = ("gloo_allreduce", "gloo_gossip", *MPI_PEERS, *FLOORS, ONE_ARRAY, FIXED)
COLUMNS = (
    Column("bytes", "size", "B", "d", 11),
    Column("tensors", "tensors", "", "d", 7),
    Column("ranks", "ranks", "", "d", 5),
    Column("ours_us", "ours", "us", ".1f", 11),
    Column("ours_p99_us", "p99", "us", ".1f", 11),
    Column("spread", "spread", "%", ".0f", 6),
    Column("peer", "peer", "", "", 15),
    Column("peer_us", "time", "us", ".1f", 11),
    Column("speedup", "speedup", "", ".2f", 8),
)
DEADLINE_S = 600.0

_JOB_BYTES = 256 << 20
_RANK_BYTES = 300 << 20
_MAILBOX_BYTES = 9 << 20
"""A ring of 8 MiB, the largest, and its words. Small arrays have two slots of their size."""


def run(
    transport: str,
    ranks: Sequence[int],
    payloads: Sequence[Payload],
    against: Sequence[str],
    repeats: int = 9,
    seconds: float = 0.2,
    figure: str | None = None,
    device: str = "cpu",
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Measure, print the table as it grows, return (environment, rows).

    One row for each (ranks, payload, peer); without peers one for each (ranks, payload). Peers
    that are not installed are left out with a line that says so. seconds: about how long each
    method runs in each repeat. spread: (max - min) / median of our repeats. ours_blocks_us and
    peer_blocks_us: the repeats. figure: a PNG to draw. device: "cuda" for arrays on CUDA devices,
    which the ranks share; without peers. Untested on hardware.
    """
    if figure is not None:
        plot.check("bench exchange", figure)
    check_device(device)
    at_least_one("bench exchange", repeats=repeats)
    positive("bench exchange", seconds=seconds)
    if device != "cpu":
        if against:
            raise ArgumentError("bench exchange: --device cuda has no peers; leave --against out")
        from ucxgossip.torch_hook.device import check_cuda

        check_cuda()  # refuses before any process is started; a context here would stay
    _check(ranks, against)
    chosen, absent = _present(against)
    jobs = [(count, batch) for count in ranks for batch in _batches(payloads)]
    for count, batch in jobs:
        _check_memory(count, batch, chosen, transport)
    with_mpi = any(peer in MPI_PEERS for peer in chosen)
    facts: dict[str, object] = {"transport": transport}
    if with_mpi:
        facts |= {"mpi": mpirun.version(), "mpi_settings": mpirun.in_force(transport)}
    if absent:
        facts["skipped"] = absent
    report = Report(f"bench exchange, float32, {repeats} repeats, medians", COLUMNS, facts)

    def take(line: str) -> None:
        row = report.take(line)
        if row is not None:
            report.row(row)

    for count, batch in jobs:
        arguments = ["-m", "ucxgossip.bench.exchange_rank", "--transport", transport]
        arguments += ["--sizes", ",".join(payload.name for payload in batch)]
        arguments += ["--against", ",".join(chosen)]
        arguments += ["--device", device]
        arguments += ["--repeats", str(repeats), "--seconds", str(seconds)]
        start = partial(run_ranks, arguments)
        if with_mpi:
            start = partial(mpirun.run_ranks, [*arguments, "--mpirun"], transport=transport)
        start(count, on_line=take, deadline_s=DEADLINE_S * len(batch))
    expected = len(ranks) * len(payloads) * max(1, len(chosen))
    if len(report.rows) != expected:
        raise BenchError(f"bench exchange: {len(report.rows)} rows where {expected} were due")
    if figure is not None:
        _draw(report.rows, transport, figure)
    return report.facts, report.rows


def _check(ranks: Sequence[int], against: Sequence[str]) -> None:
    unknown = [peer for peer in against if peer not in PEERS]
    if unknown:
        raise ArgumentError(
            f"bench exchange: unknown peer {unknown[0]!r}; choose of {', '.join(PEERS)}"
        )
    if min(ranks) < 2:
        raise ArgumentError("bench exchange: an exchange needs at least 2 ranks")


def _present(against: Sequence[str]) -> tuple[list[str], str | None]:
    """The peers that can be measured here, and why the others cannot."""
    wanted = [peer for peer in against if peer in MPI_PEERS]
    why = mpirun.why_absent() if wanted else None
    if why is None:
        return list(against), None
    return [peer for peer in against if peer not in wanted], f"{', '.join(wanted)}: {why}"


def _batches(payloads: Sequence[Payload]) -> Iterator[list[Payload]]:
    """Payloads that one job measures: a group keeps its mailboxes until it is closed."""
    batch: list[Payload] = []
    for payload in payloads:
        if batch and sum(each.nbytes for each in (*batch, payload)) > _JOB_BYTES:
            yield batch
            batch = []
        batch.append(payload)
    if batch:
        yield batch


def _check_memory(
    ranks: int, batch: Sequence[Payload], chosen: Sequence[str], transport: str
) -> None:
    """`BenchError` rather than a machine that runs out of memory while others use it."""
    arrays = [nbytes for payload in batch for nbytes in payload.arrays]
    largest = max(arrays)
    received = any(peer in ("gloo_gossip", "mpi_gossip", "mpi_put") for peer in chosen)
    window = "mpi_put" in chosen and transport != "tcp"
    reduced = 2 * largest // ranks if any("allreduce" in peer for peer in chosen) else 0
    needed = _RANK_BYTES + sum(arrays) + len(batch) * min(2 * max(arrays), _MAILBOX_BYTES)
    needed += (received + window) * largest + reduced
    if FIXED in chosen:
        needed += 2 * _MAILBOX_BYTES
    if ONE_ARRAY in chosen:
        needed += max(payload.nbytes for payload in batch) + _MAILBOX_BYTES
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and (free := int(rest.split()[0]) << 10) < ranks * needed:
            names = ",".join(payload.name for payload in batch)
            raise BenchError(
                f"bench exchange: {ranks} ranks need about {ranks * needed / 2**30:.1f} GiB for "
                f"{names}, and {free / 2**30:.1f} GiB are available; take fewer ranks, or smaller "
                "sizes, or fewer peers at a time"
            )


def _draw(rows: Sequence[dict[str, Any]], transport: str, path: str) -> None:
    """Every method's time over size."""
    curves: dict[plot.Line, plot.Points] = {}

    def add(method: str, row: dict[str, Any], key: str) -> None:
        manner = "by tensor" if row["tensors"] > 1 else ""
        line = plot.Line(method, manner, f"{row['ranks']} ranks")
        curves.setdefault(line, {})[row["bytes"]] = row[key]

    for row in rows:
        add("ours", row, "ours_us")
        if row["peer"] is not None:
            add(row["peer"], row, "peer_us")
    title = f"One round (exchange and in-place mean), transport {transport}, medians"
    plot.draw(curves, title, "time of a round (us)", path)
