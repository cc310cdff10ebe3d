"""Adam's second moment without the noise that an all-reduce would have averaged away.

With a gradient g + noise of variance s**2 on each of p ranks, Adam's v holds g**2 + s**2 / p under
all-reduce, but g**2 + s**2 / 2 where two ranks have averaged: the same rate then makes steps up to
sqrt(p / 2) times smaller. The half difference d of the two gradients, which the exchange gives for
nothing, has E[d**2] = s**2 / 2, so that the mean of v - (1 - 2 / p) n, with n the running mean of
d**2, is all-reduce's. Where two ranks average with weight a the share is
2 ((1 - a)**2 + a**2 - 1 / p), which is 1 - 2 / p for a = 1/2.

The correction is one pass before the optimizer's step and one after it; measuring d takes more.
Rejected: one factor for the rate from the
sums of v and n (no memory, but half of the effect); writing the corrected moment into v for good
(what the floor cuts off would add up).
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit


def noise_share(weight: float, size: int) -> float:
    """The part of ``2 d**2`` that an all-reduce of `size` ranks would not have in its square."""
    return max(0.0, 2 * ((1 - weight) ** 2 + weight**2 - 1 / size))


@jit.njit
def correct(
    moment: Any,
    noise: Any,
    raw: Any,
    gradient: Any,
    half: Any,
    beta: Any,
    share: Any,
    floor: Any,
) -> None:
    """Make `moment` such that Adam's update by `gradient` ends at the corrected second moment.

    All 1-D, of one dtype and length. moment: v before the step, replaced. noise: running mean of
    ``share * half**2``, updated. raw: gets what v would be after the step without correction, to be
    put back then. beta: Adam's second. floor: least part of `raw` that is left, 2 / size.
    """
    rest = gradient.dtype.type(1) - beta
    for i in range(len(moment)):
        square = rest * gradient[i] * gradient[i]
        noise[i] = beta * noise[i] + rest * share * half[i] * half[i]
        raw[i] = beta * moment[i] + square
        corrected = max(raw[i] - noise[i], floor * raw[i])
        moment[i] = (corrected - square) / beta
