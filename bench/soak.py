"""Long runs that try to break the protocol, and say so: ``python -m ucxgossip.bench.soak``.

``chunks``: chunk exchanges under random delays, every element checked. ``exchanges``: whole
exchanges of two processes, with memory, descriptors and threads watched. The exit status is 0 only
when nothing was torn, doubled, lost, overwritten or wrong, and nothing grew; 1 when something was;
2 when it could not be tried. No part of ``ucxgossip bench``, which measures speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ucxgossip.bench import soak_chunks, soak_exchanges
from ucxgossip.bench.arguments import file_to_write
from ucxgossip.bench.environment import environment
from ucxgossip.bench.table import write_json
from ucxgossip.errors import ArgumentError, GossipError
from ucxgossip.ucp import lib
from ucxgossip.ucp.context import TRANSPORTS

MOST = 1 << 30


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ArgumentError(f"{option} {text!r}: write one or more of {','.join(known)}")
    return names


def _check_count(option: str, count: int, least: int) -> None:
    if not least <= count <= MOST:
        raise ArgumentError(f"{option} is {count}; must be {least} to {MOST}")


def _facts(options: argparse.Namespace) -> dict[str, object]:
    library = lib.load()
    facts = environment(".".join(map(str, library.version)), library.path)
    return facts | {"seed": getattr(options, "seed", None)}


def chunks(options: argparse.Namespace) -> tuple[dict[str, object], list[dict[str, Any]], str]:
    """Facts, rows and the verdict ("": sound) of `soak chunks`."""
    _check_count("--chunks", options.chunks, 100)
    _check_count("--seed", options.seed, 0)
    transports = _names("--transport", options.transport, tuple(TRANSPORTS))
    ways = _names("--way", options.way, soak_chunks.WAYS)
    facts = _facts(options)
    rows = soak_chunks.run(transports, ways, options.chunks, options.seed, facts)
    sums = {name: sum(row[name] for row in rows) for name in ("chunks", *soak_chunks.FAULTS)}
    print("# " + ", ".join(f"{count} {name}" for name, count in sums.items()), flush=True)
    found = [f"{sums[name]} {name}" for name in soak_chunks.FAULTS if sums[name]]
    return facts, rows, ", ".join(found)


def exchanges(options: argparse.Namespace) -> tuple[dict[str, object], list[dict[str, Any]], str]:
    """Facts, rows and the verdict ("": sound) of `soak exchanges`."""
    _check_count("--exchanges", options.exchanges, soak_exchanges.SAMPLES)
    transports = _names("--transport", options.transport, tuple(TRANSPORTS))
    facts = _facts(options)
    rows = soak_exchanges.run(transports, options.exchanges, facts)
    found = soak_exchanges.faults(rows)
    margins = ", ".join(f"{what} {most}" for what, most in soak_exchanges.MARGINS.items())
    print(f"# growth allowed in the second half: {margins} (resident: KiB)")
    print(f"# {'; '.join(found) or 'flat'}", flush=True)
    return facts, rows, "; ".join(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m ucxgossip.bench.soak", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="WHAT")
    each = commands.add_parser("chunks", help="chunk exchanges under random delays")
    each.set_defaults(action=chunks)
    each.add_argument(
        "--chunks",
        type=int,
        default=10**7,
        help="least number of exchanges over each transport, in each way (10000000)",
    )
    each.add_argument("--way", default="thread", help="of thread,processes,stops (default: thread)")
    each.add_argument("--seed", type=int, default=0, help="of sizes, partners and delays (0)")
    both = commands.add_parser("exchanges", help="exchanges of two processes, resources watched")
    both.set_defaults(action=exchanges)
    both.add_argument(
        "--exchanges", type=int, default=10**6, help="over each transport (default: 1000000)"
    )
    for command in (each, both):
        command.add_argument("--transport", default="tcp,shm", help="default: tcp,shm")
        command.add_argument("--json", metavar="FILE", help="write the environment and rows here")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; 0 when nothing broke."""
    options = parser().parse_args(arguments)
    try:
        if options.json:
            file_to_write(options.json)
        facts, rows, fault = options.action(options)
        if options.json:
            write_json(options.json, facts, rows)
    except GossipError as error:
        print(f"soak: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if fault:
        print(f"soak: {fault}", file=sys.stderr)
    return int(bool(fault))


if __name__ == "__main__":
    sys.exit(main())
