"""The command line: ``ucxgossip doctor``, ``schedules``, ``run``, ``token`` and ``bench``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ucxgossip.bench.arguments import file_to_write
from ucxgossip.bench.commands import add as add_benches
from ucxgossip.bench.table import parse_sizes, write_json
from ucxgossip.errors import ArgumentError, GossipError
from ucxgossip.trust import TOKEN, TOKEN_FILE, new_token
from ucxgossip.ucp.context import TRANSPORTS

Result = tuple[dict[str, object], list[dict[str, Any]]]


def _doctor(options: argparse.Namespace) -> Result:
    from ucxgossip import doctor

    return doctor.run(options.transport, options.remove_stale, options.device)


def _bench_put(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import put

    return put.run(
        options.transport,
        parse_sizes(options.sizes),
        options.against,
        options.repeats,
        options.seconds,
        options.plot,
        options.device,
    )


def _bench_exchange(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import exchange, payloads

    return exchange.run(
        options.transport,
        _whole("--ranks", options.ranks, "2,4,8"),
        payloads.parse(options.sizes),
        _names(options.against),
        options.repeats,
        options.seconds,
        options.plot,
        options.device,
    )


def _schedules(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import topology

    return topology.run(_whole("--ranks", options.ranks, "2,4,8"), options.markdown)


def _bench_stragglers(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import stragglers

    methods = _names(stragglers.METHODS if options.methods is None else options.methods)
    return stragglers.run(
        options.transport,
        options.ranks,
        options.slow,
        methods,
        options.compute,
        options.steps,
        options.repeats,
    )


def _bench_train(options: argparse.Namespace) -> Result:
    from ucxgossip.bench import train, train_plan

    rates = options.rates if options.rate is None else options.rate
    plan = train_plan.make(
        options.model,
        _whole("--ranks", options.ranks, "4,8"),
        _names(options.methods),
        options.optimizer,
        None if rates is None else _numbers("--rates", rates, float, "0.01,0.03"),
        options.shards,
        options.decay,
        options.steps,
        options.batch,
        options.seeds,
        options.simulate,
    )
    return train.run(plan, options.transport, options.plot)


def _token(options: argparse.Namespace) -> Result:
    print(new_token())
    return {}, []


def run(arguments: Sequence[str]) -> int:
    """torchrun, with a token in the environment of the job; returns when the job has ended well.

    Hosts would each make another one, so a job of several gets none: it needs a token that is set
    on all of them, or a home directory that they share.
    """
    torchrun: Any = importlib.import_module("torch.distributed.run")
    host_alone = torchrun.parse_min_max_nnodes(torchrun.parse_args(arguments).nnodes) == (1, 1)
    if host_alone and TOKEN not in os.environ and TOKEN_FILE not in os.environ:
        os.environ[TOKEN] = new_token()
    torchrun.main(arguments)
    return 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _whole(option: str, text: str, example: str) -> list[int]:
    return [int(each) for each in _numbers(option, text, int, example)]


def _numbers(option: str, text: str, kind: Callable[[str], float], example: str) -> list[float]:
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{option} {text!r}: write numbers such as {example}") from None


def _version() -> str:
    return str(importlib.import_module("ucxgossip").__version__)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="ucxgossip",
        description="Gossip in place of all-reduce, one-sided over UCX, for PyTorch.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="which UCX and transport you really have, and what a put costs",
        description="Report the UCX in use, its lanes, the protocol of each size, whether puts are "
        "emulated and whether the target must progress, and measure puts between two processes.",
    )
    _common(doctor, _doctor)
    _device(doctor, "puts between the memories of CUDA devices (one will do)")
    doctor.add_argument(
        "--remove-stale",
        action="store_true",
        help="remove the shared memory that killed processes of yours left in /dev/shm",
    )

    schedules = commands.add_parser(
        "schedules",
        help="how fast each schedule brings ranks to agree",
        description="Compute, per schedule and number of ranks, the period, whether it gives the "
        "exact mean of all, and which share of the distance to it is left after a period and a "
        "step. Nothing is measured, and no UCX needed.",
    )
    schedules.set_defaults(action=_schedules)
    _json(schedules)
    ranks = "2,3,4,6,8,16,24,64,100"
    schedules.add_argument("--ranks", default=ranks, help=f"numbers of ranks (default: {ranks})")
    schedules.add_argument("--markdown", action="store_true", help="print a Markdown table")

    _launching(commands)
    bench = commands.add_parser("bench", help="measure, beside the peers")
    benches = bench.add_subparsers(required=True, metavar="WHAT")

    put = benches.add_parser("put", help="latency and bandwidth of puts, beside ucx_perftest")
    _common(put, _bench_put)
    _device(put, "between the memories of CUDA devices; latency is that of a put until its flush")
    put.add_argument(
        "--sizes", default="8,64K,4M", help="bytes, such as 8,4K,64K,1M,4M,64M (64 MiB and less)"
    )
    put.add_argument("--against", choices=["ucx_perftest"], help="measure this peer as well")
    _repeats(put, repeats=5, seconds=0.3)
    _plot(put, "latencies over sizes")
    _exchange(benches)
    _train(benches)
    _stragglers(benches)
    add_benches(benches, _common, _json, _device)
    return top


def _exchange(benches: Any) -> None:
    exchange = benches.add_parser(
        "exchange",
        help="whole rounds (put and in-place mean) beside all-reduce and MPI",
        description="Time one whole round: every rank's float32 array becomes the mean of its own "
        "and a partner's (all-reduce: of all), in place. All methods run in turn in the same "
        "processes, after each was seen to leave the right mean. Columns: our time and its 99th "
        "percentile; the spread of our repeats; the peer's time; peer's time over ours.",
        epilog="Peers: gloo_allreduce and gloo_gossip (isend and irecv); mpi_allreduce, mpi_gossip "
        "(sendrecv) and mpi_put, by Open MPI, which need mpirun (apt-get install openmpi-bin) and "
        "mpi4py (pip install mpi4py), and are left out with a message without them. Floors, what "
        "the machine can do at all: sockets (plain TCP, both directions at once) and copy (memory "
        "that the ranks share). A model with /tensors is run tensor by tensor by the peers, and in "
        "one round of all of them by ours; one_array is our round of one array of as many bytes. "
        "fixed is our round with constants that are the same for every transport and size, to see "
        "what choosing them is worth.",
    )
    _common(exchange, _bench_exchange)
    _device(exchange, "arrays on CUDA devices, which the ranks share; no peers")
    exchange.add_argument("--ranks", default="2,4", help="numbers of processes, such as 2,4,8")
    exchange.add_argument(
        "--sizes",
        default="8,64K,4M",
        help="bytes, such as 8,64K,102.4MB, or models: lenet, resnet50, gpt2 (one array of the "
        "model's size), resnet50/tensors, gpt2/tensors (its tensors as so many arrays)",
    )
    exchange.add_argument(
        "--against",
        default="",
        metavar="PEERS",
        help="what to measure as well: gloo_allreduce, gloo_gossip, mpi_allreduce, mpi_gossip, "
        "mpi_put, sockets, copy, one_array, fixed; separated by commas",
    )
    _repeats(exchange, repeats=9, seconds=0.2)
    _plot(exchange, "times over sizes")


def _stragglers(benches: Any) -> None:
    stragglers = benches.add_parser(
        "stragglers",
        help="what one slow rank costs the others",
        description="Train LeNet on digits by each method, with one rank slower than the others "
        "and without, in turn in the same processes, and compare the step times of the others. "
        "Compute is a pause on a timer, which takes no core. Columns: step times without and with "
        "the slow rank; its cost to the others, median, least and most of the repeats; accuracy of "
        "the others without and with it, and its own; its push-sum mass (1: as all); the share of "
        "rounds left out.",
    )
    _common(stragglers, _bench_stragglers)
    stragglers.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    stragglers.add_argument(
        "--slow", type=float, default=5.0, help="how many times slower (default: 5)"
    )
    stragglers.add_argument(
        "--methods", help="as for bench train (default: allreduce and the main modes of gossip)"
    )
    stragglers.add_argument(
        "--compute", type=float, default=20.0, help="ms of compute a step (default: 20)"
    )
    stragglers.add_argument(
        "--steps", type=int, default=40, help="steps of a method in one repeat (default: 40)"
    )
    stragglers.add_argument(
        "--repeats", type=int, default=5, help="interleaved repeats (default: 5)"
    )


def _launching(commands: Any) -> None:
    start = commands.add_parser(
        "run",
        help="torchrun, with a token that only this job knows",
        description="Start a script as torchrun does, with a fresh token in the environment of "
        f"its ranks ({TOKEN}), unless one is set there, or {TOKEN_FILE} is. By the token ranks "
        "know each other; docs/security.md says against whom it protects. A job of several hosts "
        "(--nnodes) needs the same token on all: set one that `ucxgossip token` has printed, or "
        "let them share a home directory.",
        epilog="Example: ucxgossip run --standalone --nproc-per-node 4 train.py. All options are "
        "torchrun's: torchrun --help lists them.",
    )
    start.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="what torchrun takes")

    token = commands.add_parser(
        "token",
        help="print a new token",
        description=f"Print a new token, 32 random bytes in hexadecimal, for {TOKEN} on every host "
        f"of a job, or for a file that only you may read, named by {TOKEN_FILE}: "
        "(umask 077; ucxgossip token > token).",
    )
    token.set_defaults(action=_token)


def _train(benches: Any) -> None:
    train = benches.add_parser(
        "train",
        help="accuracy reached by gossip, by all-reduce and alone, and step times",
        description="Train small models on data that needs no download: scikit-learn's digits, "
        "the standard library's source. Paired seeds: for a seed, every method has the same first "
        "weights and the same batches. Accuracies are percent of the test set, after the last "
        "step: mean over replicas, and the worst replica; both means over seeds. Consensus is the "
        "replicas' relative RMS distance. Efficiency is the step time of method local over a "
        "method's own, in the same processes.",
        epilog="Methods: local; allreduce (DDP over gloo); gossip-both-atc, gossip-both-awc, "
        "gossip-weights-atc, gossip-weights-awc, gossip-gradients, gossip-push_sum, and "
        "gossip-deferred (the authors' rule; with --simulate only). Options after +: state "
        "(optimizer's state too), noise (Adam's second moment corrected), staleN (mixed up to N "
        "steps late), localK (rounds every K-th step), globalH (exact mean every H-th step); with "
        "--simulate also shuffle (samples round the ring), dropF (lost puts), shiftN (weights N "
        "rounds ahead of gradients). Example: gossip-both-atc+state. A constant rate shows "
        "disagreement that a cosine decay hides.",
    )
    _common(train, _bench_train)
    train.add_argument(
        "--model", default="lenet", help="lenet, convnet, resnet20, gpt or gpt4 (default: lenet)"
    )
    train.add_argument("--ranks", default="4", help="numbers of ranks, such as 4,8 (default: 4)")
    train.add_argument(
        "--methods",
        default="local,allreduce,gossip-both-atc",
        help="what to compare (default: local,allreduce,gossip-both-atc)",
    )
    train.add_argument(
        "--optimizer", default="sgd", help="sgd (momentum 0.9) or adamw (default: sgd)"
    )
    rate = train.add_mutually_exclusive_group()
    rate.add_argument("--rate", help="learning rate (default: one at which all-reduce does well)")
    rate.add_argument(
        "--rates",
        help="learning rates to try, such as 0.01,0.02,0.04; reported is each method's own best, "
        "by its worst replica on the test set",
    )
    train.add_argument(
        "--shards", default="iid", help="iid, or skewed: few labels a rank (default: iid)"
    )
    train.add_argument(
        "--decay", default="constant", help="constant or cosine, of the rate (default: constant)"
    )
    train.add_argument("--steps", type=int, help="steps of each run (default: 1000; gpt: 400)")
    train.add_argument("--batch", type=int, help="samples a rank and step (default: 16; gpt: 8)")
    train.add_argument("--seeds", type=int, default=5, help="runs of each method (default: 5)")
    train.add_argument(
        "--simulate",
        action="store_true",
        help="all ranks in one process: accuracies only, by the same schedule and mix; without it "
        "each rank is a process",
    )
    _plot(train, "the runs")


def _common(command: argparse.ArgumentParser, action: Callable[..., Result]) -> None:
    command.set_defaults(action=action)
    command.add_argument(
        "--transport", default="auto", help=f"one of {', '.join(TRANSPORTS)} (default: auto)"
    )
    _json(command)


def _device(command: argparse.ArgumentParser, cuda: str) -> None:
    command.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help=f"cuda: {cuda}. UNTESTED ON HARDWARE (default: cpu)",
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the environment and the rows here")


def _plot(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--plot", metavar="FILE", help=f"draw {what} as PNG (needs matplotlib)")


def _repeats(command: argparse.ArgumentParser, repeats: int, seconds: float) -> None:
    command.add_argument(
        "--repeats", type=int, default=repeats, help=f"interleaved repeats (default: {repeats})"
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"about how long one method runs in one repeat (default: {seconds})",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it measured what it says, 2 with a message otherwise."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"] and given[1:2] not in (["-h"], ["--help"], []):
        # argparse would take torchrun's options for ours.
        return run(given[2:] if given[1] == "--" else given[1:])
    if not given:
        parser().print_help(sys.stderr)
        return 2
    options = parser().parse_args(given)
    if not hasattr(options, "action"):
        parser().error("run: what? Give torchrun's options and a script")
    try:
        transport = getattr(options, "transport", "auto")  # schedules has none
        if transport not in TRANSPORTS:
            raise ArgumentError(
                f"unknown transport {transport!r}; choose one of {', '.join(TRANSPORTS)}"
            )
        if getattr(options, "json", None):
            file_to_write(options.json)
        facts, rows = options.action(options)
        if getattr(options, "json", None):
            write_json(options.json, facts, rows)
    except GossipError as error:
        print(f"ucxgossip: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
