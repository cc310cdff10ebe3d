"""An attached model: what its hooks do under backward, after the step and before a forward.

With ``mix="both"`` and ``combine="atc"`` a step goes: gradients are put bucket by bucket as
backward completes them and averaged in place, all of them before ``backward()`` returns (so that
clipping and scaling see whole gradients); the optimizer steps; the new weights are put and
averaged under the next forward, where each module waits for its own buckets only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip.engine import words as w
from ucxgossip.errors import (
    AccumulationError,
    ClosedError,
    ExchangeError,
    GossipError,
    SparseGradientError,
)
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.mixing import MIXES, Collective
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.bucket import Bucket

MARK = "_ucxgossip"
"""Attribute by which parameters and optimizers know that they are attached."""


class _Hook:
    """A hook that a copy of the model (``copy.deepcopy``, as for an average of weights) lacks."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        self.call(*arguments)

    def __deepcopy__(self, memo: object) -> _Hook:
        return _Hook(_nothing)


def _nothing(*_: object) -> None:
    """What a copied model's hooks do."""


class Gossip:
    """A model that gossips. Made by `attach`; `detach()` or the end of ``with`` undoes it."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        mix: str,
        combine: str,
        schedule: Schedule,
        runs: Sequence[Sequence[torch.nn.Parameter]],
    ) -> None:
        self.schedule = schedule
        self.model, self.optimizer, self.group = model, optimizer, group
        self.mix, self.combine = mix, combine
        self._weights_travel, self._gradients_travel = MIXES[mix]
        self._held = combine == "awc"
        self._collective = Collective(group)
        self._synchronising = True
        self._detached = False
        self._in_backward: int | None = None
        self._waits, self._wait_s, self._exchange_s = 0, 0.0, 0.0
        self._rounds, self._bytes, self._distance = 0, 0, 0.0
        self._open: set[Mailbox] = set()  # mailboxes whose last round nobody has waited for
        self._buckets = [
            Bucket(group, run, self._weights_travel, self._gradients_travel) for run in runs
        ]
        for bucket in self._buckets:
            bucket.adopt()
        self._broadcast()
        self._handles: list[Any] = []
        self._called: set[torch.nn.Module] = set()
        self._learning = True
        self._needs: dict[torch.nn.Module, list[Bucket]] = {}
        self._install()
        if self._held:
            self._post_weights()

    # --- setting up ----------------------------------------------------------------------------

    def _broadcast(self) -> None:
        """Rank 0's weights, frozen parameters and buffers to all."""
        for bucket in self._buckets:
            self._collective.broadcast(bucket.weights.array)
        rest = [p.data for p in self.model.parameters() if not p.requires_grad]
        rest += list(self.model.buffers())
        if rest:
            blob = np.concatenate([_bytes_of(tensor) for tensor in rest])
            self._collective.broadcast(blob)
            start = 0
            for tensor in rest:
                nbytes = tensor.numel() * tensor.element_size()
                _set_bytes(tensor, blob[start : start + nbytes])
                start += nbytes

    def _install(self) -> None:
        setattr(self.optimizer, MARK, True)
        keep = self._handles.append
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                setattr(parameter, MARK, True)
                if self._gradients_travel:
                    hook = functools.partial(self._on_gradient, bucket, index)
                    register: Any = parameter.register_post_accumulate_grad_hook
                    keep(register(hook))
        keep(self.optimizer.register_step_pre_hook(self._before_step))
        keep(self.optimizer.register_step_post_hook(self._after_step))
        if self._gradients_travel:
            self._own_zero_grad = vars(self.optimizer).get("zero_grad")
            self._original_zero_grad = self.optimizer.zero_grad
            self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        if self._weights_travel and not self._held:
            owner = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
            for module in self.model.modules():
                own = [owner[id(p)] for p in module.parameters(recurse=False) if id(p) in owner]
                self._needs[module] = list(dict.fromkeys(own))
                if own or module is self.model:
                    # First of all pre-hooks: others (weight_norm) read the parameters.
                    keep(
                        module.register_forward_pre_hook(_Hook(self._before_forward), prepend=True)
                    )
            for register in (
                self.model.register_state_dict_pre_hook,
                self.model.register_load_state_dict_pre_hook,
            ):
                chosen: Any = register
                keep(chosen(_Hook(self._before_state_dict)))

    # --- gradients, under backward -------------------------------------------------------------

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's ``zero_grad``; gradients that travel are zeroed where they are."""
        self._original_zero_grad(set_to_none)
        held = {id(p) for each in self.optimizer.param_groups for p in each["params"]}
        for bucket in self._buckets:
            bucket.reset_gradients(held)

    def _on_gradient(self, bucket: Bucket, index: int, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise SparseGradientError(
                f"a parameter of shape {tuple(parameter.shape)} got a {parameter.grad.layout} "
                "gradient, which has no fixed place in a bucket"
            )
        if not self._synchronising:
            return
        if self._in_backward is None:
            self._in_backward = _backward_number()
            for each in self._buckets:
                each.start_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if self._in_backward != _backward_number():
            raise self._broken_backward()
        if bucket.posted:
            raise AccumulationError(
                "a gradient arrived for a bucket that is being exchanged; run all but the last "
                "backward of a step under gossip.no_sync()"
            )
        if bucket.receive(index):
            self._post_gradients(bucket)

    def _post_gradients(self, bucket: Bucket) -> None:
        bucket.posted = True
        if bucket.gradients is None or bucket.gradients_box is None:
            return
        self._post(bucket.gradients_box, bucket.gradients.buffer)

    def _after_backward(self) -> None:
        """Send what backward left out, and wait: gradients are whole when ``backward()`` ends."""
        self._in_backward = None
        unused: list[tuple[Bucket, int]] = []
        for bucket in self._buckets:
            if bucket.posted:
                continue
            for index, received in enumerate(bucket.received):
                if not received:
                    bucket.take_in(index)
                    unused.append((bucket, index))
            self._post_gradients(bucket)
        for bucket in self._buckets:
            if bucket.gradients_box is not None:
                self._wait(bucket.gradients_box)
        for bucket, index in unused:
            # Unused here and by the partner: the optimizer is to see no gradient at all.
            if not bool(bucket.parameters[index].grad.any()):  # type: ignore[union-attr]
                bucket.parameters[index].grad = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a ``backward()`` in here stay local and accumulate, as in DDP."""
        before, self._synchronising = self._synchronising, False
        try:
            yield
        finally:
            self._synchronising = before

    # --- weights, after the step ---------------------------------------------------------------

    def _broken_backward(self) -> ExchangeError:
        return ExchangeError(
            "the last backward() ended in an exception after some of its gradients were put; the "
            "ranks are out of step. End the job, or detach() and attach() on all ranks"
        )

    def _before_step(self, *_: object) -> None:
        if self._in_backward is not None:
            raise self._broken_backward()
        for bucket in self._buckets:
            bucket.check_in_place()
        if self._held:
            self._settle()
        else:
            self.wait()

    def _after_step(self, *_: object) -> None:
        self._post_weights()

    def _post_weights(self) -> None:
        for bucket in self._buckets:
            if bucket.weights_box is not None:
                self._post(bucket.weights_box, bucket.weights.buffer, self._held)

    def _settle(self) -> None:
        """Let held rounds mix, and wait for them."""
        for bucket in self._buckets:
            if bucket.weights_box is not None:
                self.group.engine.unhold(bucket.weights_box)
        self._wait_weights(self._buckets)

    def _before_forward(self, module: torch.nn.Module, _: object) -> None:
        """Wait for the weights that `module` is about to use.

        Which modules are called is learnt in the first forward, under which each waits for all:
        a module whose parameters are used without a call of its own (the output projection
        of MultiheadAttention) is served by its nearest ancestor that is called.
        """
        if self._learning:
            if module is self.model and self._called:
                self._learn()
            self._called.add(module)
            if self._learning:
                self._wait_weights(self._buckets)
                return
        self._wait_weights(self._needs[module])

    def _learn(self) -> None:
        self._learning = False
        parents = {child: m for m in self.model.modules() for child in m.children()}
        for module in list(self._needs):
            server = module
            while server not in self._called and server in parents:
                server = parents[server]
            if server is not module:
                merged = self._needs[server] + self._needs[module]
                self._needs[server] = list(dict.fromkeys(merged))

    def _before_state_dict(self, *_: object) -> None:
        if not self.group.failed:  # after a failure nothing moves any more: an emergency checkpoint
            self.wait()

    def _wait_weights(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            if bucket.weights_box is not None:
                self._wait(bucket.weights_box)

    def wait(self) -> None:
        """Block until every weight round under way has ended; the parameters are whole then.

        Called by the hooks before a forward, a step and a ``state_dict()``; call it before reading
        parameters by other ways (``model.parameters()``, a metric on weights). Under ``"awc"``
        there is nothing to wait for: the weights change in the step only, and may not be written
        by others between steps.
        """
        self._check_attached()
        if not self._held:
            self._wait_weights(self._buckets)

    # --- rounds --------------------------------------------------------------------------------

    def _post(self, mailbox: Mailbox, buffer: Any, held: bool = False) -> None:
        if self.group.size == 1:
            return
        step = mailbox.round
        self.group.post_scheduled(mailbox, buffer, buffer, self.schedule, step, held=held)
        self._rounds += 1
        row = self.group.engine.table[mailbox.index]
        if row[w.TO] >= 0:
            self._bytes += int(row[w.NBYTES])
        self._open.add(mailbox)

    def _wait(self, mailbox: Mailbox) -> None:
        if mailbox not in self._open:
            return
        start = time.perf_counter()
        blocked = self.group.engine.active(mailbox)
        self.group.wait(mailbox)
        self._open.discard(mailbox)
        if blocked:
            self._waits += 1
            self._wait_s += time.perf_counter() - start
        row = self.group.engine.table[mailbox.index]
        self._exchange_s += (int(row[w.DONE_NS]) - int(row[w.POSTED_NS])) * 1e-9
        self._distance = float(self.group.engine.floats[mailbox.index, w.DISTANCE])

    # --- what a user asks ----------------------------------------------------------------------

    def _arrays(self) -> list[NDArray[Any]]:
        return [bucket.weights.array for bucket in self._buckets]

    def _whole(self) -> None:
        self._check_attached()
        if self._held:
            self._settle()
        else:
            self.wait()

    def consensus_distance(self) -> float:
        """Relative RMS distance of the replicas, ``sqrt(mean_i |w_i - w|**2) / |w|``. Collective.

        Exact; moves the weights through O(log p) rounds, so for a log line, not for each step.
        """
        self.wait()
        return self._collective.consensus_distance(self._arrays())

    def synchronize(self) -> None:
        """Replace the weights and the float buffers by their mean over all ranks. Collective.

        For an evaluation or a checkpoint of one common model; equal on all ranks to rounding.
        """
        self._whole()
        for array in self._arrays():
            self._collective.average(array)
        for buffer in self.model.buffers():
            if buffer.dtype in (torch.float32, torch.float64) and buffer.numel():
                flat = buffer.detach().numpy().reshape(-1).copy()
                self._collective.average(flat)
                buffer.copy_(torch.from_numpy(flat).view(buffer.shape))
        self._resume()

    def _resume(self) -> None:
        if self._held:
            self._post_weights()

    def stats(self) -> dict[str, Any]:
        """What was exchanged so far, by this rank.

        rounds: exchanges of one bucket; bytes: payload put; waits: how often the training thread
        blocked, wait_s: for how many seconds; exchange_s: seconds from post to end, over all
        rounds; hidden: the part of that under compute, 0 to 1; distance: squared distance to the
        partner in the last round mixed; skipped and staleness (by rank received from, in steps)
        are for modes that do not wait, of which this release has none: 0 and empty.
        """
        hidden = 1.0 - self._wait_s / self._exchange_s if self._exchange_s > 0 else 1.0
        return {
            "rounds": self._rounds,
            "bytes": self._bytes,
            "waits": self._waits,
            "wait_s": self._wait_s,
            "exchange_s": self._exchange_s,
            "hidden": min(1.0, max(0.0, hidden)),
            "distance": self._distance,
            "skipped": 0,
            "staleness": {},
        }

    # --- the end -------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if self._detached:
            raise ClosedError("this model was detached")

    def detach(self) -> None:
        """Finish the rounds under way and leave the model as it was found. Collective.

        Parameters keep their values, in memory of their own; hooks are gone; the optimizer's
        ``zero_grad`` is its own again. Further calls do nothing.
        """
        if self._detached:
            return
        try:
            self._whole()
        except GossipError as error:
            self.group.abort(str(error))
            raise
        finally:
            self._leave()

    def _leave(self) -> None:
        self._detached = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._gradients_travel:
            del self.optimizer.zero_grad
            if self._own_zero_grad is not None:
                self.optimizer.zero_grad = self._own_zero_grad  # type: ignore[method-assign]
        delattr(self.optimizer, MARK)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                delattr(parameter, MARK)
            bucket.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.detach()
        elif not self._detached:
            # Rounds may be under way that will never end: stop them, and tell the others.
            self.group.abort(f"{type(error).__name__}: {error}")
            self._leave()


def _backward_number() -> int:
    """Which backward pass this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _set_bytes(tensor: torch.Tensor, blob: NDArray[np.uint8]) -> None:
    flat = torch.from_numpy(blob.copy()).view(tensor.dtype)
    with torch.no_grad():
        tensor.copy_(flat.view(tensor.shape))
