"""The ways to train together that `bench train` compares, by name.

``local``, ``allreduce``, and gossip: ``gossip-MIX-COMBINE`` as `attach` takes them, with options
after ``+``: ``gossip-both-atc+state``, ``gossip-weights-atc+stale2+local4``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ucxgossip.errors import ArgumentError

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

ALONE = ("local", "allreduce")

OPTIONS = {
    "state": "the optimizer's state is mixed as the weights are",
    "staleN": "weights put at one step are mixed N steps later, as a difference",
    "localK": "rounds in every K-th step only",
    "globalH": "and the exact mean of all in every H-th step",
    "dropF": "each put is left out with probability F (simulation only)",
    "shiftN": "the weights' round is N later than the gradients' (simulation only)",
}


@dataclass(frozen=True)
class Method:
    """One way to train together.

    mix: what travels ("both", "weights", "gradients", "push_sum", or "" where there is no
    gossip); combine: when the weights are averaged ("atc", "awc", "deferred").
    """

    name: str
    mix: str = ""
    combine: str = "atc"
    state: bool = False
    staleness: int = 0
    local_steps: int = 1
    global_every: int = 0
    drop: float = 0.0
    shift: int = 0

    @property
    def gossips(self) -> bool:
        """Whether there are rounds with partners."""
        return self.mix != ""

    @property
    def simulated_only(self) -> bool:
        """Whether `attach` has no such mode."""
        return self.combine == "deferred" or self.drop > 0 or self.shift > 0


def parse(name: str) -> Method:
    """The method called `name`; `ArgumentError`, which lists what is known, for any other."""
    base, *options = name.split("+")
    if base in ALONE and not options:
        return Method(name)
    if base not in BASES:
        raise _unknown(name)
    mix, combine = BASES[base]
    chosen = {"mix": mix, "combine": combine}
    return Method(name, **_options(name, options, chosen))  # type: ignore[arg-type]


def _options(name: str, options: list[str], chosen: dict[str, str]) -> dict[str, object]:
    fields = {
        "stale": "staleness",
        "local": "local_steps",
        "global": "global_every",
        "drop": "drop",
        "shift": "shift",
    }
    found: dict[str, object] = dict(chosen)
    for option in options:
        match = re.fullmatch(r"(state|[a-z]+?)(\d+(?:\.\d+)?)?", option)
        word, value = (match[1], match[2]) if match else (option, None)
        if word == "state" and value is None and "state" not in found:
            found["state"] = True
        elif word in fields and value is not None and fields[word] not in found:
            if word != "drop" and "." in value:
                raise _unknown(name)
            found[fields[word]] = float(value) if word == "drop" else int(value)
        else:
            raise _unknown(name)
    travels = chosen["mix"] != "gradients"
    if not travels and {"state", "staleness", "shift"} & set(found):
        raise ArgumentError(f"method {name!r}: no weights travel for +state, +stale or +shift")
    if found.get("staleness", 0) and chosen["combine"] != "atc":
        raise ArgumentError(f"method {name!r}: +staleN goes with -atc only")
    if found.get("staleness", 0) and chosen["mix"] == "push_sum":
        raise ArgumentError(f"method {name!r}: +staleN does not go with push_sum")
    if found.get("local_steps", 1) == 0:
        raise ArgumentError(f"method {name!r}: +localK starts at 1")
    if float(found.get("drop", 0.0)) > 1:  # type: ignore[arg-type]
        raise ArgumentError(f"method {name!r}: +dropF is a probability, from 0 to 1")
    return found


def _unknown(name: str) -> ArgumentError:
    known = ", ".join([*ALONE, *BASES])
    options = "; ".join(f"+{option}: {what}" for option, what in OPTIONS.items())
    return ArgumentError(
        f"unknown method {name!r}; choose of {known}; gossip takes options once each: {options}"
    )
