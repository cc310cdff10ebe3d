"""The ways to train together that `bench train` compares, by name.

``local``, ``lockstep``, ``allreduce``, and gossip: ``gossip-MIX-COMBINE`` as `attach` takes them,
with options after ``+``: ``gossip-both-atc+state``, ``gossip-weights-atc+stale2``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ucxgossip.errors import ArgumentError

NCCL = "allreduce-nccl"
"""DDP over NCCL, for models on a device each: `bench step` alone has such."""
ALONE = ("local", "lockstep", "allreduce")
"""local: no communication. allreduce: DDP over gloo. lockstep: nothing is sent but a word to the
step's partner, waited for after each step as the weights of gossip are: what it costs to wait for a
partner at all."""

BASES: dict[str, tuple[str, str]] = {
    "gossip-both-atc": ("both", "atc"),
    "gossip-both-awc": ("both", "awc"),
    "gossip-weights-atc": ("weights", "atc"),
    "gossip-weights-awc": ("weights", "awc"),
    "gossip-gradients": ("gradients", "atc"),
    "gossip-push_sum": ("push_sum", "atc"),
    "gossip-deferred": ("weights", "deferred"),
}
"""(mix, combine) by name. deferred: the authors' rule, ``(w_i(t+1) + w_j(t)) / 2``."""

OPTIONS = {
    "state": "the optimizer's state is mixed as the weights are",
    "staleN": "what is put in one step is mixed up to N later (simulated: weights only, exactly N)",
    "globalH": "the exact mean of all as well, in every H-th step",
    "localK": "rounds in every K-th step only",
    "bucketN": "tensors travel in buckets of N KiB (simulated: no difference)",
    "noise": "Adam's second moment without the noise that an all-reduce would average away",
    "shuffle": "samples go round the ring of ranks, as gossip.shuffled does (simulation only)",
    "dropF": "each put is left out with probability F (simulation only)",
    "shiftN": "weights go by the round N later than the step's gradients (simulation only)",
}

_FIELDS = {
    "stale": "staleness",
    "global": "global_every",
    "local": "local_steps",
    "bucket": "bucket_kib",
    "drop": "drop",
    "shift": "shift",
}


@dataclass(frozen=True)
class Method:
    """One way to train together.

    mix: what travels ("both", "weights", "gradients", "push_sum", or "" where there is no
    gossip); combine: when the weights are averaged ("atc", "awc", "deferred"). The other fields
    are what `OPTIONS` says; shift, bucket_kib None: as `attach` does.
    """

    name: str
    mix: str = ""
    combine: str = "atc"
    state: bool = False
    staleness: int = 0
    local_steps: int = 1
    global_every: int = 0
    drop: float = 0.0
    shift: int | None = None
    noise: bool = False
    shuffle: bool = False
    bucket_kib: int | None = None

    @property
    def gossips(self) -> bool:
        """Whether there are rounds with partners."""
        return self.mix != ""

    @property
    def weights_travel(self) -> bool:
        """Whether weights are mixed, by whatever rule."""
        return self.mix not in ("", "gradients")

    @property
    def simulated_only(self) -> bool:
        """Whether `attach` has no such mode."""
        unusual = self.combine == "deferred" or self.shift is not None
        return unusual or self.drop > 0 or self.shuffle


def parse(name: str, devices: bool = False) -> Method:
    """The method called `name`; `ArgumentError`, which lists what is known, for any other.

    devices: `NCCL` is known too.
    """
    if devices and name == NCCL:
        return Method(name)
    base, *options = name.split("+")
    if base in ALONE and not options:
        return Method(name)
    if base not in BASES:
        raise _unknown(name)
    mix, combine = BASES[base]
    method = Method(name, mix, combine)
    given: set[str] = set()
    for option in options:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)?", option)
        if match is None or match[1] in given:
            raise _unknown(name)
        word, value = match[1], match[2]
        given.add(word)
        method = replace(method, **_option(name, word, value))
    _check(method)
    return method


def _option(name: str, word: str, value: str | None) -> dict[str, Any]:
    if word in ("state", "noise", "shuffle") and value is None:
        return {word: True}
    if word not in _FIELDS or value is None:
        raise _unknown(name)
    if word == "drop":
        return {"drop": float(value)}
    if not value.isdecimal():
        raise _unknown(name)
    return {_FIELDS[word]: int(value)}


def _check(method: Method) -> None:
    """`ArgumentError` for options that do not go together."""
    wrong = None
    if not method.weights_travel and (method.state or method.staleness or method.shift is not None):
        wrong = "no weights travel that +state, +stale or +shift could mean"
    elif method.staleness and (method.combine != "atc" or method.mix == "push_sum"):
        wrong = "+staleN goes with both-atc and weights-atc only"
    elif method.state and method.mix == "push_sum":
        wrong = "push-sum moves weights only"
    elif method.noise and (method.mix != "both" or method.staleness or method.local_steps > 1):
        wrong = "+noise goes with both, in every step"
    elif method.bucket_kib == 0:
        wrong = "+bucketN starts at 1"
    elif method.local_steps < 1:
        wrong = "+localK starts at 1"
    elif method.drop > 1:
        wrong = "+dropF is a probability, from 0 to 1"
    if wrong:
        raise ArgumentError(f"method {method.name!r}: {wrong}")


def _unknown(name: str) -> ArgumentError:
    known = ", ".join([*ALONE, *BASES])
    options = "; ".join(f"+{option}: {what}" for option, what in OPTIONS.items())
    return ArgumentError(
        f"unknown method {name!r}; choose of {known}; gossip takes options, each once: {options}"
    )
