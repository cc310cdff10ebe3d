"""`ucxgossip bench put`: our put beside ucx_perftest's, size by size, interleaved in one run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ucxgossip.bench import plot
from ucxgossip.bench.arguments import at_least_one, positive
from ucxgossip.bench.environment import environment
from ucxgossip.bench.pair import Pair, check_device
from ucxgossip.bench.perftest import Perftest, find_perftest
from ucxgossip.bench.summary import summarize
from ucxgossip.bench.table import Column, Table
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

    Each size is measured `repeats` times, ours and the peer's in turn, about `seconds` each; the
    figures are medians over the repeats. latency_spread is (max - min) / median of our repeats,
    in percent. latency_p99_us is over the samples of all repeats; below 20 us a round trip, a
    sample is the mean of some round trips, since reading the clock would be seen. figure: a PNG to
    draw. device: "cuda" puts from one device's memory to another's, or within one; latency is then
    that of a put until it is flushed. Untested on hardware.
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
    library = lib.load()
    version = ".".join(map(str, library.version))
    peer = find_perftest(library.path) if against else None
    table = Table(COLUMNS)
    rows: list[dict[str, Any]] = []
    with Pair(transport, max(sizes), device=device) as pair:
        facts = environment(version, library.path)
        facts["settings"] = " ".join(f"{k}={v}" for k, v in pair.side.context.settings.items())
        if pair.side.memory is not None:
            facts["gpu"] = pair.side.memory.describes
            if not pair.verify(max(sizes)):
                raise BenchError(
                    f"bench put: a put of {max(sizes)} bytes between devices left other bytes"
                )
        facts["lanes"] = " ".join(pair.side.endpoint.transports())
        table.header(f"ucxgossip bench put, {repeats} repeats, medians", facts)
        for nbytes in sizes:
            row = _row(pair, peer, transport, nbytes, repeats, seconds)
            table.row(row)
            rows.append(row)
    if not rows:
        raise BenchError("bench put measured nothing")
    if figure is not None:
        _draw(rows, transport, figure)
    return facts, rows


def _row(
    pair: Pair, peer: Perftest | None, transport: str, nbytes: int, repeats: int, seconds: float
) -> dict[str, Any]:
    ours: dict[str, list[float]] = {"latency": [], "bandwidth": []}
    theirs: dict[str, list[float]] = {"latency": [], "bandwidth": []}
    trip_us = median(pair.latency(nbytes, 20, 1)) * 2
    batch = max(1, min(100, round(20 / trip_us)))
    samples = max(20, min(5000, round(seconds * 1e6 / (trip_us * batch))))
    first = pair.bandwidth(nbytes, 64)
    puts = max(64, round(seconds * first * 1e6 / nbytes))
    sampled: list[float] = []
    for _ in range(repeats):
        times = pair.latency(nbytes, samples, batch)
        sampled += times
        ours["latency"].append(median(times))
        ours["bandwidth"].append(pair.bandwidth(nbytes, puts))
        if peer is not None:
            theirs["latency"].append(peer.latency(transport, nbytes, seconds=seconds))
            theirs["bandwidth"].append(peer.bandwidth(transport, nbytes, seconds=seconds))
    latency, bandwidth = median(ours["latency"]), median(ours["bandwidth"])
    row: dict[str, Any] = {
        "bench": "put",
        "transport": transport,
        "device": pair.device,
        "bytes": nbytes,
        "latency_us": latency,
        "latency_p99_us": summarize([each * 1e-6 for each in sampled]).p99_us,
        "latency_spread": 100 * (max(ours["latency"]) - min(ours["latency"])) / latency,
        "bandwidth_MBps": bandwidth,
        "peer": None,
        "peer_latency_us": None,
        "peer_bandwidth_MBps": None,
        "latency_ratio": None,
        "bandwidth_ratio": None,
    }
    if peer is not None:
        peer_latency, peer_bandwidth = median(theirs["latency"]), median(theirs["bandwidth"])
        row |= {
            "peer": "ucx_perftest",
            "peer_latency_us": peer_latency,
            "peer_bandwidth_MBps": peer_bandwidth,
            "latency_ratio": latency / peer_latency,
            "bandwidth_ratio": bandwidth / peer_bandwidth,
        }
    return row


def _draw(rows: Sequence[dict[str, Any]], transport: str, path: str) -> None:
    """Latencies over sizes, ours and the peer's."""
    curves: dict[plot.Line, plot.Points] = {}
    for method, key in (("ours", "latency_us"), ("ucx_perftest", "peer_latency_us")):
        points = {row["bytes"]: row[key] for row in rows if row[key] is not None}
        if points:
            curves[plot.Line(method, "", transport)] = points
    plot.draw(curves, "One put, medians", "latency, one way (us)", path)
