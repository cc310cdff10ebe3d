"""The command lines of `ucxgossip bench` step, idle, flat, startup and kernels, for the CLI."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ucxgossip.bench.table import parse_sizes
from ucxgossip.errors import ArgumentError

Result = tuple[dict[str, object], list[dict[str, Any]]]
Common = Callable[[argparse.ArgumentParser, Callable[[argparse.Namespace], Result]], None]


def add(
    benches: Any,
    common: Common,
    json: Callable[[argparse.ArgumentParser], None],
    device: Callable[[argparse.ArgumentParser, str], None],
) -> None:
    """Add the five to the subparsers `benches`.

    common: gives a command its action, --transport and --json; json: --json alone.
    """
    _add_step(benches, common, device)
    _add_idle(benches, common)
    _add_flat(benches, common)
    _add_startup(benches, common)
    _add_kernels(benches, json)


def parse_counts(text: str) -> list[int]:
    """Numbers of ranks out of "2,4,8"."""
    return _whole("--ranks", text, "2,4,8")


def _whole(option: str, text: str, example: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{option} {text!r}: write numbers such as {example}") from None


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _step(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import step

    return step.run(
        options.transport,
        _names(step.MODELS if options.models is None else options.models),
        options.ranks,
        _names(step.METHODS if options.methods is None else options.methods),
        options.cores,
        options.batch,
        options.steps,
        options.repeats,
        options.device,
    )


def _add_step(
    benches: Any, common: Common, device: Callable[[argparse.ArgumentParser, str], None]
) -> None:
    step = benches.add_parser(
        "step",
        help="what communication adds to a model's training step",
        description="Train small models by each method and without communication, in turn in the "
        "same processes, one compute thread a rank, and compare the step times. Columns: a step; "
        "the same without communication (local); their ratio, the median of the repeats, and its "
        "spread, (max - min) / median; how long the rounds of a step take from post to end, and "
        "the part of that under compute.",
        epilog="On two cores: --cores 1 for two ranks that share their cores with their engines; "
        "--cores 2 for a rank with a core to itself and another for its engine, whose partner does "
        "not compute but takes as long (bench/step.py says how).",
    )
    common(step, _step)
    device(step, "models on CUDA devices, which the ranks share where there are fewer")
    step.add_argument(
        "--models",
        help="of lenet, convnet, resnet20, resnet50, gpt, gpt4 (default: convnet, resnet20, gpt "
        "and gpt4)",
    )
    step.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    step.add_argument(
        "--methods",
        help="as for bench train (default: lockstep,gossip-both-atc,gossip-weights-atc,"
        "gossip-weights-awc,allreduce), and allreduce-nccl on a device a rank; local is always "
        "measured",
    )
    step.add_argument(
        "--cores",
        type=int,
        metavar="N",
        help="pin each rank to N cores: 1, shared by all its threads, or 2, one for the training "
        "thread alone (default: not pinned)",
    )
    step.add_argument(
        "--batch",
        type=int,
        help="samples a rank and step (default: 16; resnet50 32, gpt 8, gpt4 24)",
    )
    step.add_argument(
        "--steps",
        type=int,
        help="steps of a method in one repeat (default: as many as take half a second alone)",
    )
    step.add_argument("--repeats", type=int, default=9, help="interleaved repeats (default: 9)")


def _idle(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import idle

    return idle.run(options.transport, parse_counts(options.ranks), options.seconds)


def _add_idle(benches: Any, common: Common) -> None:
    idle = benches.add_parser(
        "idle",
        help="CPU time of ranks that have nothing to do",
        description="Join, do some rounds, then sleep; report the CPU time of a rank's process "
        "meanwhile, in percent of one core: the rank that took most, the mean, and the engine's "
        "part of the mean.",
    )
    common(idle, _idle)
    idle.add_argument("--ranks", default="2", help="numbers of processes (default: 2)")
    idle.add_argument("--seconds", type=float, default=10.0, help="how long (default: 10)")


def _flat(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import flat

    if options.transport not in ("auto", "tcp"):
        raise ArgumentError("bench flat: only tcp goes over the links between namespaces")
    return flat.run(
        parse_counts(options.ranks),
        parse_sizes(options.sizes),
        options.rate,
        options.repeats,
        options.seconds,
        options.plot,
        options.keep_windows,
        options.congestion,
    )


def _add_flat(benches: Any, common: Common) -> None:
    flat = benches.add_parser(
        "flat",
        help="exchange time against the number of ranks, on links of one rate",
        description="Give each rank a network namespace and a link of its own to a bridge, shaped "
        "to one rate in both directions, and time a round of ours beside gloo's all-reduce on more "
        "and more ranks. Growth is relative to the fewest ranks; idle is the share of all cores "
        "that had nothing to do, without which the cores were measured and not the links. Needs "
        "root and iproute2; what it makes it removes.",
    )
    common(flat, _flat)
    flat.add_argument("--ranks", default="2,4,8", help="numbers of processes (default: 2,4,8)")
    flat.add_argument("--sizes", default="1MB,4MB", help="bytes (default: 1MB,4MB)")
    flat.add_argument("--rate", default="200mbit", help="of each link (default: 200mbit)")
    flat.add_argument(
        "--keep-windows",
        action="store_true",
        help="let TCP keep its congestion window over a pause (tcp_slow_start_after_idle=0)",
    )
    flat.add_argument(
        "--congestion", metavar="NAME", help="TCP's congestion control there (default: the host's)"
    )
    flat.add_argument("--repeats", type=int, default=7, help="interleaved repeats (default: 7)")
    flat.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="about how long one method runs in one repeat (default: 1)",
    )
    flat.add_argument("--plot", metavar="FILE", help="draw time over ranks as PNG (matplotlib)")


def _startup(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import startup

    return startup.run(options.transport, parse_counts(options.ranks), options.repeats)


def _add_startup(benches: Any, common: Common) -> None:
    startup = benches.add_parser(
        "startup",
        help="how long until a rank can train, beyond importing torch",
        description="Start jobs anew, and time import, join and attach in each rank beyond "
        "importing torch: the slowest rank, the median of the repeats. A first start, which may "
        "compile, is not counted. Compiled: functions that the counted starts compiled all the "
        "same. Import alone: import ucxgossip in a process that has numpy and numba only.",
    )
    common(startup, _startup)
    startup.add_argument("--ranks", default="1,2,4", help="numbers of processes (default: 1,2,4)")
    startup.add_argument("--repeats", type=int, default=5, help="counted starts (default: 5)")


def _kernels(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import kernels

    return kernels.run(
        options.device,
        None if options.sizes is None else parse_sizes(options.sizes),
        None if options.pairs is None else kernels.parse_pairs(options.pairs),
        None if options.threads is None else _whole("--threads", options.threads, "1,2"),
        options.repeats,
    )


def _add_kernels(benches: Any, json: Callable[[argparse.ArgumentParser], None]) -> None:
    kernels = benches.add_parser(
        "kernels",
        help="the mixing kernels, beside memory's speed and torch",
        description="Time dst += alpha * (src - dst) by each backend, in turn with a bound: on the "
        "CPU a triad as STREAM has it (a = b + s * c, float32, three arrays of dst's bytes, on as "
        "many threads), on CUDA a copy of dst. GB/s counts what has to move: dst twice and src "
        "once, whatever a backend moves besides; the triad's counts its three arrays. Columns: a "
        "call; its spread over the repeats, interquartile; GB/s; the bound's; their ratio; and how "
        "many times faster than torch's add_ then mul_. Ratios are medians of each repeat's.",
        epilog="Beside our backends: axpy (dst += s * src by numba, float32 alone: what the mix "
        "does to memory, without its squared distance), add_mul (torch's add_ then mul_) and lerp "
        "(torch's lerp_; a payload of another type is converted first). The triad writes without "
        "reading, for which caches read the line all the same: a mix can be faster than it.",
    )
    kernels.set_defaults(action=_kernels)
    json(kernels)
    kernels.add_argument(
        "--device", default="cpu", help="cpu or cuda, UNTESTED ON HARDWARE (default: cpu)"
    )
    kernels.add_argument("--sizes", help="bytes of dst (default: 102.4MB; cuda: 1GiB)")
    kernels.add_argument(
        "--pairs",
        help="types of dst and src, such as float32,float32/bfloat16,float16 (default: all)",
    )
    kernels.add_argument(
        "--threads", help="numbers of threads on the CPU, such as 1,2 (default: 1 and all cores)"
    )
    kernels.add_argument("--repeats", type=int, default=15, help="interleaved (default: 15)")
