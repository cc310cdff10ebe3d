"""`ucxgossip bench put`: our put beside ucx_perftest's, size by size, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from ucxgossip.bench import plot
from ucxgossip.bench.arguments import at_least_one, positive
from ucxgossip.bench.pair import WINDOW, Pair, check_device
from ucxgossip.bench.perftest import Perftest, find_perftest
from ucxgossip.bench.report import Report, settings_in_force
from ucxgossip.bench.summary import summarize
from ucxgossip.bench.table import Column
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.ucp import lib

PEERS = ("ucx_perftest",)
COLUMNS = (
    Column("bytes", "size", "B", "d", 11),
    Column("transport", "transport", "", "", 9),
    Column("latency_us", "latency", "us", ".2f", 10),
    Column("latency_p99_us", "p99", "us", ".2f", 10),
    Column("peer_latency_us", "peer", "us", ".2f", 10),
    Column("latency_ratio", "ratio", "", ".2f", 6),
    Column("bandwidth_MBps", "bandwidth", "MB/s", ".1f", 10),
    Column("peer_bandwidth_MBps", "peer", "MB/s", ".1f", 10),
    Column("bandwidth_ratio", "ratio", "", ".2f", 6),
    Column("latency_spread", "spread", "%", ".0f", 7),
    Column("peer_latency_spread", "peer's", "%", ".0f", 7),
)


def run(
    transport: str,
    sizes: Sequence[int],
    against: str | None,
    repeats: int = 5,
    seconds: float = 0.3,
    figure: str | None = None,
    device: str = "cpu",
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Measure, print the table as it grows, return (environment, rows).

    Each size is measured `repeats` times, ours and the peer's in turn, about `seconds` each, either
    over connections of its own, since a connection's latency is one of several; the figures are
    medians over the repeats. latency_spread and its like are (max - min) / median, in percent;
    latency_p99_us is over the samples of all repeats; below 20 us a round trip, a sample is the
    mean of some round trips, since reading the clock would be seen. figure: a PNG to draw. device:
    "cuda" puts from one device's memory to another's, or within one; latency is then that of a put
    until it is flushed. Untested on hardware.
    """
    check_device(device)
    if device != "cpu" and against is not None:
        raise ArgumentError("bench put: --device cuda has no peer; leave --against out")
    if figure is not None:
        plot.check("bench put", figure)
    if against is not None and against not in PEERS:
        raise ArgumentError(f"bench put: unknown peer {against!r}; choose {', '.join(PEERS)}")
    at_least_one("bench put", repeats=repeats)
    positive("bench put", seconds=seconds)
    peer = find_perftest(lib.load().path) if against else None
    report = Report(
        f"bench put, {repeats} repeats, medians",
        COLUMNS,
        {"transport": transport, "window": WINDOW},
    )
    for nbytes in sizes:
        put = _Put(transport, nbytes, seconds, partial(Pair, transport, nbytes, device=device))
        report.begin(put.try_out())
        report.row(_row(put, peer, repeats, device))
    if figure is not None:
        _draw(report.rows, transport, figure)
    return report.facts, report.rows


_Values = dict[str, list[float]]


@dataclass
class _Put:
    """How a size is measured: samples of `batch` round trips, and puts in a row."""

    transport: str
    nbytes: int
    seconds: float
    open: Callable[[], Pair]
    batch: int = 1
    samples: int = 20
    puts: int = 64

    def try_out(self) -> dict[str, object]:
        """Find out how many make `seconds`; what the pair is, for the environment."""
        with self.open() as pair:
            facts: dict[str, object] = {"settings": settings_in_force(pair.side.context.settings)}
            if pair.side.memory is not None:
                facts["gpu"] = pair.side.memory.describes
                if not pair.verify(self.nbytes):
                    raise BenchError(
                        f"bench put: a put of {self.nbytes} bytes between devices left other bytes"
                    )
            facts["lanes"] = " ".join(pair.side.endpoint.transports())
            trip_us = median(pair.latency(self.nbytes, 20, 1)) * 2
            self.batch = max(1, min(100, round(20 / trip_us)))
            self.samples = max(20, min(5000, round(self.seconds * 1e6 / (trip_us * self.batch))))
            first = pair.bandwidth(self.nbytes, 64)
            self.puts = max(64, round(self.seconds * first * 1e6 / self.nbytes))
        return facts

    def once(self) -> tuple[list[float], float]:
        """One repeat: latencies of its samples (us), and its bandwidth."""
        with self.open() as pair:
            pair.latency(self.nbytes, 20, self.batch)
            times = pair.latency(self.nbytes, self.samples, self.batch)
            pair.bandwidth(self.nbytes, 64)
            return times, pair.bandwidth(self.nbytes, self.puts)


def _row(put: _Put, peer: Perftest | None, repeats: int, device: str) -> dict[str, Any]:
    ours: _Values = {"latency_us": [], "bandwidth_MBps": []}
    theirs: _Values = {"latency_us": [], "bandwidth_MBps": []}
    sampled: list[float] = []
    for _ in range(repeats):
        times, bandwidth = put.once()
        sampled += times
        ours["latency_us"].append(median(times))
        ours["bandwidth_MBps"].append(bandwidth)
        if peer is not None:
            asked = (put.transport, put.nbytes)
            theirs["latency_us"].append(peer.latency(*asked, seconds=put.seconds))
            theirs["bandwidth_MBps"].append(peer.bandwidth(*asked, seconds=put.seconds))
    row: dict[str, Any] = {
        "bench": "put",
        "transport": put.transport,
        "device": device,
        "bytes": put.nbytes,
        "window": WINDOW,
        "latency_p99_us": summarize([each * 1e-6 for each in sampled]).p99_us,
        "peer": None if peer is None else "ucx_perftest",
    }
    for key, values in ours.items():
        what = key.split("_")[0]
        row |= {key: median(values), f"{what}_spread": _spread(values), f"{what}_repeats": values}
        others = theirs[key]
        row |= {
            f"peer_{key}": median(others) if others else None,
            f"peer_{what}_spread": _spread(others) if others else None,
            f"peer_{what}_repeats": others,
            f"{what}_ratio": median(values) / median(others) if others else None,
        }
    return row


def _spread(values: Sequence[float]) -> float:
    """(max - min) / median, in percent."""
    return 100 * (max(values) - min(values)) / median(values)


def _draw(rows: Sequence[dict[str, Any]], transport: str, path: str) -> None:
    """Latencies over sizes, ours and the peer's."""
    curves: dict[plot.Line, plot.Points] = {}
    for method, key in (("ours", "latency_us"), ("ucx_perftest", "peer_latency_us")):
        points = {row["bytes"]: row[key] for row in rows if row[key] is not None}
        if points:
            curves[plot.Line(method, "", transport)] = points
    plot.draw(curves, "One put, medians", "latency, one way (us)", path)
