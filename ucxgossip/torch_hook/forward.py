"""Before a forward: each module waits for its own weights, and for no others.

Which modules are called, and in which order they need which bucket, is learnt in the first
forward, under which each waits for all: a module whose parameters are used without a call of its
own (the output projection of MultiheadAttention) is served by its nearest ancestor that is called.
Modules inside a compiled one are served by that one, whose hook stands outside the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ucxgossip.torch_hook.bucket import Bucket


class Hook:
    """A hook that a copy of the model (``copy.deepcopy``, as for an average of weights) lacks."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    # What torch.compiler.disable sets, without the second that importing the compiler takes.
    _torchdynamo_disable = True

    def __call__(self, *arguments: Any) -> None:
        self.call(*arguments)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: object) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., None]]]:
        return Hook, (_nothing,)


def _nothing(*_: object) -> None:
    """What a copied model's hooks do."""


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of `module` run code of ``torch.compile``."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _reachable(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Each module under (and with) `module`, and the one whose hook can serve it."""
    seen: set[torch.nn.Module] = set()

    def walk(
        at: torch.nn.Module, server: torch.nn.Module | None
    ) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        if at in seen:
            return
        seen.add(at)
        # "is None" throughout: the truth of a module may be its length.
        yield at, at if server is None else server
        inner = at if server is None and is_compiled(at) else server
        for child in at.children():
            yield from walk(child, inner)

    yield from walk(module, None)


def _waiting(buckets: Iterable[Bucket]) -> Callable[..., None]:
    """A hook that waits for the weights of `buckets`: it runs for each module in every step."""
    waits = [each.weights_stream.wait for each in buckets if each.weights_stream is not None]

    def wait(*_: object) -> None:
        for each in waits:
            each()

    return wait


class Forward:
    """The forward pre-hooks of `model`.

    wait: called with the buckets a module is about to read, as long as it is not known which those
    are. learnt: called with all buckets in the order in which a forward needs them, once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        buckets: Sequence[Bucket],
        wait: Callable[[Iterable[Bucket]], None],
        learnt: Callable[[Sequence[Bucket]], None],
    ) -> None:
        self.model, self.buckets, self.wait, self.learnt = model, list(buckets), wait, learnt
        self._hooks: dict[torch.nn.Module, Hook] = {}
        self._needs: dict[torch.nn.Module, list[Bucket]] = {}
        self._called: dict[torch.nn.Module, None] = {}

    def install(self) -> list[Any]:
        """Register the hooks; their handles."""
        owner = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        for module, server in _reachable(self.model):
            own = [owner[id(p)] for p in module.parameters(recurse=False) if id(p) in owner]
            self._needs.setdefault(module, [])
            self._needs[server] = list(dict.fromkeys([*self._needs.setdefault(server, []), *own]))
        self._hooks = {
            module: Hook(self._before)
            for module, server in _reachable(self.model)
            if server is module and (self._needs[module] or module is self.model)
        }
        return [
            # First of all pre-hooks: others (weight_norm) read the parameters.
            module.register_forward_pre_hook(hook, prepend=True)
            for module, hook in self._hooks.items()
        ]

    def _before(self, module: torch.nn.Module, _: object) -> None:
        if module is not self.model or not self._called:
            self._called.setdefault(module)
            self.wait(self.buckets)
            return
        self._learn()
        for each, hook in self._hooks.items():
            hook.call = _waiting(self._needs[each])
        self._hooks[module].call()

    def _learn(self) -> None:
        parents: dict[torch.nn.Module, list[torch.nn.Module]] = {}
        for parent in self.model.modules():
            for child in parent.children():
                parents.setdefault(child, []).append(parent)
        for module in list(self._needs):
            for server in self._servers(module, parents):
                merged = self._needs[server] + self._needs[module]
                self._needs[server] = list(dict.fromkeys(merged))
        needed = [bucket for module in self._called for bucket in self._needs.get(module, [])]
        self.learnt(list(dict.fromkeys([*needed, *self.buckets])))

    def _servers(
        self, module: torch.nn.Module, parents: dict[torch.nn.Module, list[torch.nn.Module]]
    ) -> Iterator[torch.nn.Module]:
        """The nearest ancestors that are called; several where a module is shared."""
        if module in self._called:
            return
        for parent in parents.get(module, []):
            if parent in self._called:
                yield parent
            else:
                yield from self._servers(parent, parents)
