"""Mistakes of a training loop that no round would show: parameters or optimizers left out.

What trains without being in a bucket is averaged with nobody, and neither the loss nor
`consensus_distance`, which looks at the buckets, would tell. Both are looked for at the optimizer's
step, where a look costs about a microsecond.

Rejected: walking the model in each step (100 to 200 us for a ResNet-50); taking up parameters that
are unfrozen later (buckets and mailboxes are laid out once, on all ranks alike).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ucxgossip.errors import ModelError

_LOG = logging.getLogger("ucxgossip")

MANY = 50
"""Steps of other optimizers without one of the attached one's: more than where several take turns,
as a critic's before each of its generator's."""


def _counts(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """How many parameters its groups have, which changes where any is added."""
    return tuple(len(group["params"]) for group in optimizer.param_groups)


class LeftOut:
    """Parameters of `model` that `optimizer` trains and that are not among `taken` (ids)."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, taken: set[int]
    ) -> None:
        self._model, self._optimizer, self._taken = model, optimizer, taken
        self._seen: tuple[int, ...] = ()
        self._others: list[torch.nn.Parameter] = []

    def check(self) -> None:
        """`ModelError` that names them, if there are any."""
        counts = _counts(self._optimizer)
        if counts != self._seen:
            self._seen = counts
            self._others = [
                parameter
                for group in self._optimizer.param_groups
                for parameter in group["params"]
                if id(parameter) not in self._taken
            ]
        if any(parameter.requires_grad for parameter in self._others):
            self._look()

    def _look(self) -> None:
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        self._others = [each for each in self._others if id(each) in names]  # not another model's
        found = [names[id(each)] for each in self._others if each.requires_grad]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ModelError(
                f"{', '.join(found[:3])}{more}: unfrozen or added after attach, so averaged with "
                "nobody. Call detach() before such a change, on all ranks, and attach() again "
                "after it"
            )


class OtherOptimizers:
    """Notices steps of optimizers that are not attached, and hold parameters among `taken` (ids).

    Before such a step the rounds under way end (`settle`), as before a step of `optimizer`'s: it
    writes what they read and mix. `MANY` in a row are warned of, since no exchange follows them.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, taken: set[int], settle: Callable[[], None]
    ) -> None:
        self._optimizer, self._taken, self._settle = optimizer, taken, settle
        self._known: WeakKeyDictionary[torch.optim.Optimizer, tuple[tuple[int, ...], bool]]
        self._known = WeakKeyDictionary()
        self._in_a_row = 0
        self._told = False
        _watch(self, True)

    def remove(self) -> None:
        """Look no more."""
        _watch(self, False)

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` is about to step."""
        if optimizer is self._optimizer:
            self._in_a_row = 0
            return
        if not self._shares(optimizer):
            return
        self._in_a_row += 1
        if self._in_a_row == MANY and not self._told:
            self._told = True
            _LOG.warning(
                "%s stepped the model %d times, and the optimizer it was attached with (%s) did "
                "not meanwhile: only the attached one's steps are followed by exchanges. Attach "
                "the one that steps; of several, the last",
                type(optimizer).__name__,
                MANY,
                type(self._optimizer).__name__,
            )
        self._settle()

    def _shares(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it holds a parameter of ours."""
        counts = _counts(optimizer)
        known = self._known.get(optimizer)
        if known is None or known[0] != counts:
            shares = any(
                id(parameter) in self._taken
                for group in optimizer.param_groups
                for parameter in group["params"]
            )
            known = self._known[optimizer] = counts, shares
        return known[1]


# torch iterates over its global hooks in each step of each thread: one hook, which stays. A model
# that is forgotten without detach() must not live on here.
_watching: tuple[ref[OtherOptimizers], ...] = ()
_changing = threading.Lock()


def _watch(one: OtherOptimizers, more: bool) -> None:
    global _watching
    with _changing:
        others = tuple(each for each in _watching if each() not in (None, one))
        _watching = (*others, ref(one)) if more else others


def _before_any_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for each in _watching:
        watcher = each()
        if watcher is not None:
            watcher.before(optimizer)


register_optimizer_step_pre_hook(_before_any_step)
