"""The worker's numbers: what one rank measures, all ranks in one, the whole run in one row."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any, NamedTuple

Numbers = dict[str, float | None]


class Traffic(NamedTuple):
    """What this rank exchanged since training began; NaN where the method cannot tell."""

    bytes: float  # of payload, sent
    exchange_s: float = math.nan  # from post to done, summed over all exchanges
    waited_s: float = math.nan  # how much of it the training thread stood still

    def since(self, before: Traffic) -> Traffic:
        """What came on top of `before`."""
        return Traffic(*(b - a for a, b in zip(before, self, strict=True)))


class Epoch(NamedTuple):
    """One rank's numbers of one epoch."""

    loss: float
    train_s: float
    accuracy: float  # percent of the test set, by this rank's own replica
    traffic: Traffic


def over_ranks(ranks: list[Epoch], distance: float, steps: int) -> Numbers:
    """One epoch of all ranks: means, and the worst replica, and the slowest rank's time.

    What is not known or not finite (of replicas that diverged) is None: JSON has no NaN.
    """
    traffic = [r.traffic for r in ranks]
    train_s = max(r.train_s for r in ranks)
    exchange_ms = 1e3 * statistics.fmean(t.exchange_s for t in traffic) / steps
    waited_ms = 1e3 * statistics.fmean(t.waited_s for t in traffic) / steps
    numbers = {
        "train_s": train_s,
        "loss": statistics.fmean(r.loss for r in ranks),
        "accuracy": statistics.fmean(r.accuracy for r in ranks),
        "worst_accuracy": min(r.accuracy for r in ranks),
        "consensus": distance,
        "step_ms": 1e3 * train_s / steps,
        "bytes_per_step": statistics.fmean(t.bytes for t in traffic) / steps,
        "exchange_ms": exchange_ms,
        "waited_ms": waited_ms,
        "hidden_ms": exchange_ms - min(waited_ms, exchange_ms),
    }
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def run_row(history: list[Numbers]) -> dict[str, Any]:
    """A run in one row: the last epoch's quality, the median epoch's times.

    The first epoch, which warms up caches and connections, is left out of the medians.
    """
    last = {key: history[-1][key] for key in ("loss", "accuracy", "worst_accuracy", "consensus")}
    steady = history[1:] or history
    medians = {
        key: _median([epoch[key] for epoch in steady])
        for key in ("step_ms", "bytes_per_step", "exchange_ms", "waited_ms")
    }
    return last | medians | {"hidden": hidden(medians["exchange_ms"], medians["waited_ms"])}


def hidden(exchange: float | None, waited: float | None) -> float | None:
    """The share of the exchange that ran beside the computation, 0 to 1."""
    if not exchange or waited is None:
        return None
    return min(1.0, max(0.0, 1 - waited / exchange))


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def announce(method: str, epochs: int, epoch: Numbers, *, as_json: bool) -> None:
    """One line on stdout: for the demo to parse, or for people to read."""
    if as_json:
        print("@" + json.dumps({"method": method, "epochs": epochs} | epoch), flush=True)
        return
    print(
        f"{method} {epoch['epoch']}/{epochs}  loss {_text(epoch['loss'], '.4f')}"
        f"  accuracy {_text(epoch['accuracy'], '.1f')} %"
        f" (worst {_text(epoch['worst_accuracy'], '.1f')} %)"
        f"  apart {_text(epoch['consensus'], '.1e')}  step {_text(epoch['step_ms'], '.2f')} ms"
        f"  exchange {_text(epoch['exchange_ms'], '.2f')} ms"
        f" (waited {_text(epoch['waited_ms'], '.2f')} ms)",
        flush=True,
    )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
