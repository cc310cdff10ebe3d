"""`ucxgossip doctor`: what transport you really have, before you wonder why it is slow.

UCX falls back in silence: a put may be emulated by messages, and then the target must progress
and every byte is copied. So this asks UCX which protocol serves each size, and measures, over a
pair of processes on this machine. (Between machines the same questions are answered by running it
under the settings of the job; links are measured by `bench exchange`.)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from ucxgossip import segments
from ucxgossip.bench.environment import environment
from ucxgossip.bench.pair import Pair, check_device
from ucxgossip.bench.table import Column, Table
from ucxgossip.device import driver
from ucxgossip.device.admission import check_wheel
from ucxgossip.engine import Constants
from ucxgossip.errors import BenchError, GossipError
from ucxgossip.mailbox import SMALL, usual_depth
from ucxgossip.tuning import usual
from ucxgossip.ucp import lib

SIZES = (8, 4096, 65536, 1 << 20, 4 << 20)
COLUMNS = (
    Column("bytes", "size", "B", "d", 10),
    Column("latency_us", "latency", "us", ".2f", 10),
    Column("bandwidth_MBps", "bandwidth", "MB/s", ".0f", 10),
    Column("emulated", "emulated", "", "", 9),
    Column("protocol", "protocol", "", "", 44),
)
_PUT_TABLE = "remote memory write by ucp_put"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_PROBE_S = 120.0


def run(
    transport: str, remove_stale: bool = False, device: str = "cpu"
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Print the report, return (environment, rows); a row for each size.

    remove_stale: remove the segments of shared memory that killed processes left. device: "cuda"
    asks about puts between memories of CUDA devices; untested on hardware.
    """
    check_device(device)
    if device == "cuda":
        check_wheel(driver.load(), lib.load().origin)  # refuses before anything is printed
    library = lib.load()
    facts = environment(".".join(map(str, library.version)), library.path)
    facts |= {
        "ucx_origin": library.origin,
        "rdma_devices": " ".join(lib.rdma_devices()) or "none",
        "transport": transport,
    }
    found = _probe(transport, device)
    facts |= found["facts"]
    left = segments.stale()
    facts["stale_segments"] = len(left)
    facts |= _tuning(transport)
    table = Table(COLUMNS)
    table.header("ucxgossip doctor: puts between two processes of this machine", facts)
    rows: list[dict[str, Any]] = found["rows"]
    for row in rows:
        table.row(row | {"emulated": {True: "yes", False: "no", None: None}[row["emulated"]]})
    for advice in advise(facts, rows):
        print(f"# {advice}")
    _report(left, remove_stale)
    return facts, rows


def _tuning(transport: str) -> dict[str, object]:
    """The constants that a group over `transport` takes, if `join(tuning=)` names no others.

    By transport, by whether all ranks are on one host, and by size.
    """
    here, afar = usual(transport, one_host=True), usual(transport)
    message = "" if transport == "shm" else f" (up to {afar.eager} B one message over a network)"
    slots = ", ".join(f"{nbytes} B: {usual_depth(nbytes)}" for nbytes in (8, SMALL // 2, SMALL))
    facts: dict[str, object] = {"tuning": _words(here)}
    if afar != here:
        facts["tuning, several hosts"] = _words(afar)
    return facts | {
        "rounds": f"in chunks of {here.chunk} B{message}; a blocking one of more than `ring` "
        "chunks through a ring of so many",
        "slots": f"{slots}, more: {usual_depth(SMALL + 1)}",
    }


def _words(constants: Constants) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(constants).items())


def _report(left: list[segments.Segment], remove: bool) -> None:
    """Say which segments killed processes left behind, and remove them if asked to."""
    if not left:
        return
    size = sum(segment.nbytes for segment in left)
    print(f"# Shared memory that killed processes left: {len(left)} files, {size} bytes:")
    for segment in left:
        print(f"#   {segment.path}")
    if remove:
        segments.remove(left)
        print("# They are removed.")
    else:
        print("# `ucxgossip doctor --remove-stale` removes them.")


def advise(facts: dict[str, object], rows: list[dict[str, Any]]) -> list[str]:
    """What a user should know or do about these findings, a line each."""
    lines = []
    if facts.get("verified") is False:
        lines.append("WRONG BYTES: a put between devices did not leave what it was given.")
    if facts.get("device") == "cuda":
        lines.append(
            "These are UCX's own puts between devices. Buckets of attach are copied by the driver "
            "between processes of one host whose devices it connects (stats()['direct_ways']), "
            "else through pinned host memory, as `ucxgossip doctor` without --device measures it."
        )
    if any(row["emulated"] for row in rows):
        lines.append(
            "Some puts are emulated by active messages: each byte is copied by both sides' CPU. "
            "A newer UCX (pip install ucxgossip[ucx]) does better over TCP."
        )
    if facts["target_must_progress"]:
        lines.append(
            "A put completes only when its target drives UCX; the engine thread does that."
        )
    if facts["rdma_devices"] != "none" and facts["ucx_origin"] == "wheel":
        lines.append(
            "An RDMA device is present but the wheel's UCX is built without verbs: install the "
            f"system's UCX, or point {lib.ENVIRONMENT_VARIABLE} to one."
        )
    return lines or ["Puts are served by the transport itself."]


def _probe(transport: str, device: str = "cpu") -> dict[str, Any]:
    """Run `main` in a child whose UCX writes its choice of protocols to a file."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ucx.log"
        try:
            child = subprocess.run(
                [sys.executable, "-m", "ucxgossip.doctor", transport, device],
                env={**os.environ, "UCX_LOG_FILE": str(log)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PROBE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BenchError(
                f"doctor: the probe over {transport} did not end within {_PROBE_S:g} s"
            ) from None
        if child.returncode:
            said = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise BenchError(f"doctor: the probe over {transport} failed: {''.join(said)}")
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        text = log.read_text(errors="replace") if log.exists() else ""
    protocols = parse_protocols(text, "host" if device == "cpu" else "cuda")
    for row in found["rows"]:
        if found["facts"]["mapped"]:
            # The engine stores there itself; what UCX would choose after a fence does not matter.
            row["protocol"], row["emulated"] = "mapped memory, stored to directly", False
            continue
        name = next((each[2] for each in protocols if each[0] <= row["bytes"] <= each[1]), None)
        row["protocol"] = name
        row["emulated"] = None if name is None else "software emulation" in name
    return found


def parse_protocols(text: str, memory: str = "host") -> list[tuple[float, float, str]]:
    """(first byte, last byte, protocol) of puts, out of UCX's PROTO_INFO tables (UCX 1.14 on).

    memory: the kind of memory that they are out of, "host" or "cuda".
    """
    found: list[tuple[float, float, str]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if _PUT_TABLE in line:
            inside = memory in line
        elif inside and len(cells) == 3 and ".." in cells[0]:
            first, last = cells[0].split("..")
            found.append((_bytes(first), _bytes(last), f"{cells[1]} {cells[2]}".strip()))
        elif inside and found and len(cells) < 3 and "+" not in line:
            inside = False
    return found


def _bytes(text: str) -> float:
    if text == "inf":
        return float("inf")
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise BenchError(f"doctor: cannot read {text!r} in UCX's protocol table")
    return int(match[1]) * _UNITS[match[2]]


def main() -> None:
    """The probe: measure over a pair, and print the findings as one line of JSON."""
    transport, device = sys.argv[1:3]
    settings = {"PROTO_INFO": "y"} if lib.load().version >= (1, 14, 0) else {}
    rows: list[dict[str, Any]] = []
    try:
        with Pair(transport, max(SIZES), settings, device) as pair:
            verified = device == "cpu" or pair.verify(max(SIZES))
            alone = pair.completes_alone(1 << 20)
            for nbytes in SIZES:
                latency = median(pair.latency(nbytes, 200, 1))
                puts = max(64, min(20000, (64 << 20) // nbytes))
                rows.append(
                    {
                        "bench": "doctor",
                        "transport": transport,
                        "bytes": nbytes,
                        "latency_us": latency,
                        "bandwidth_MBps": pair.bandwidth(nbytes, puts),
                    }
                )
            facts = {
                "lanes": " ".join(pair.side.endpoint.transports()) or "unknown before UCX 1.14",
                "settings": " ".join(f"{k}={v}" for k, v in pair.side.context.settings.items()),
                "target_must_progress": not alone,
                "mapped": device == "cpu" and bool(pair.side.key.pointer(pair.side.remote)),
                "device": device,
            }
            if pair.side.memory is not None:
                facts |= {"gpu": pair.side.memory.describes, "verified": verified}
    except GossipError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps({"facts": facts, "rows": rows}))


if __name__ == "__main__":
    main()
