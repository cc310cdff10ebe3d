"""Gradients under backward: each bucket is put as backward completes it, all are waited for at its
end, so that clipping, scaling and the optimizer see whole gradients.

Rejected: waiting in the optimizer's step (a user's ``clip_grad_norm_`` would see half of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ucxgossip.errors import AccumulationError, ExchangeError, SparseGradientError
from ucxgossip.torch_hook.bucket import Bucket
from ucxgossip.torch_hook.noise import NoiseCorrection
from ucxgossip.torch_hook.scaler import Scaler


class Gradients:
    """The backward passes of an attached model.

    due: whether the coming step has a round. went_backward: a backward has ended since `step_done`.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        due: Callable[[], bool],
        scaler: Scaler | None,
        noise: NoiseCorrection | None,
    ) -> None:
        self.buckets, self.due = list(buckets), due
        self.scaler, self.noise = scaler, noise
        self.travel = any(bucket.gradients is not None for bucket in self.buckets)
        self.went_backward = False
        self._synchronising = True
        self._in_backward: int | None = None
        self._in_local: int | None = None
        self._scale = 1.0

    def install(self) -> Iterator[Any]:
        """Register a hook on every parameter, where there is something to see; their handles."""
        if not self.travel and self.scaler is None:
            return
        for bucket in self.buckets:
            for index, parameter in enumerate(bucket.parameters):
                hook = self._hook(bucket, index) if self.travel else self._note
                register: Any = parameter.register_post_accumulate_grad_hook
                yield register(hook)

    def _hook(self, bucket: Bucket, index: int) -> Callable[[torch.Tensor], None]:
        """`_on_gradient` for one parameter, with the plain case in few steps.

        It runs for every parameter in every step: 11 us each before, 2 us so.
        """
        assert bucket.gradients is not None
        place = bucket.gradients.views[index].data_ptr()
        strided, backward_number = torch.strided, torch._C._current_graph_task_id

        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if (
                self._in_backward == backward_number()
                and self._synchronising
                and not bucket.received[index]
                and gradient is not None
                and gradient.layout is strided
                and gradient.data_ptr() == place
            ):
                if bucket.note(index):
                    self._post(bucket)
            else:
                self._on_gradient(bucket, index, parameter)

        return hook

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a ``backward()`` in here stay local and accumulate."""
        before, self._synchronising = self._synchronising, False
        try:
            yield
        finally:
            self._synchronising = before

    def check_ended(self) -> None:
        """`ExchangeError` if a backward began that never ended."""
        if self._in_backward is not None:
            raise self._broken()

    def step_done(self) -> None:
        """The optimizer has used the gradients."""
        self.went_backward = False

    def exchange_zeros(self) -> None:
        """Take part in the gradients' round of a step for which there are none."""
        if not self.travel or not self.due() or self.went_backward:
            return
        self._start()
        for bucket in self.buckets:
            bucket.set_zero()
            self._post(bucket)
        self._settle()
        for bucket in self.buckets:
            bucket.set_zero()

    def _note(self, _: torch.Tensor) -> None:
        self.went_backward |= self._synchronising

    def _on_gradient(self, bucket: Bucket, index: int, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise SparseGradientError(
                f"a parameter of shape {tuple(parameter.shape)} got a {parameter.grad.layout} "
                "gradient, which has no fixed place in a bucket"
            )
        if not self._synchronising:
            return
        if not self.due():
            number = _backward_number()
            if not self.went_backward and self._in_local != number:
                self._in_local = number
                for each in self.buckets:
                    each.start_backward()
                torch.autograd.Variable._execution_engine.queue_callback(self._after_local)
            bucket.receive(index)
            return
        if self._in_backward is None:
            self._in_backward = _backward_number()
            self._start()
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if self._in_backward != _backward_number():
            raise self._broken()
        if bucket.posted:
            raise AccumulationError(
                "a gradient arrived for a bucket that is being exchanged; run all but the last "
                "backward of a step under gossip.no_sync()"
            )
        if bucket.receive(index):
            self._post(bucket)

    def _start(self) -> None:
        scaler = self.scaler
        self._scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        for bucket in self.buckets:
            bucket.start_backward()

    def _post(self, bucket: Bucket) -> None:
        bucket.posted = True
        if bucket.gradients is None or bucket.gradients_stream is None:
            return
        if self._scale != 1.0:  # each rank has its own
            bucket.gradients.tensor.mul_(1.0 / self._scale)
        if self.noise is not None:
            self.noise.before_exchange(bucket)
        bucket.gradients_stream.post()

    def _settle(self) -> None:
        for bucket in self.buckets:
            if bucket.gradients is not None and bucket.gradients_stream is not None:
                bucket.gradients_stream.settle()
                if self.noise is not None:
                    self.noise.after_exchange(bucket, bucket.gradients_stream.position - 1)
                if self._scale != 1.0:
                    bucket.gradients.tensor.mul_(self._scale)

    def _after_local(self) -> None:
        """End a backward without a round: unused parameters have no gradient."""
        self._in_local = None
        self.went_backward = True
        for bucket in self.buckets:
            for parameter, received in zip(bucket.parameters, bucket.received, strict=True):
                if not received and parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None

    def _after_backward(self) -> None:
        """Send what backward left out, and wait."""
        unused: list[tuple[Bucket, int]] = []
        for bucket in self.buckets:
            if bucket.posted:
                continue
            for index, received in enumerate(bucket.received):
                if not received:
                    bucket.take_in(index)
                    unused.append((bucket, index))
            self._post(bucket)
        self._settle()
        self._in_backward = None
        self.went_backward = True
        for bucket, index in unused:
            # Unused here and by the partner: the optimizer is to see no gradient at all.
            if not bool(bucket.parameters[index].grad.any()):  # type: ignore[union-attr]
                bucket.parameters[index].grad = None

    def _broken(self) -> ExchangeError:
        return ExchangeError(
            "a backward() began and has not ended: the last one raised an exception after some "
            "of its gradients were put, so that ranks are out of step (end the job, or detach() "
            "and attach() on all ranks), or one runs within another (checkpoint(use_reentrant="
            "True): use use_reentrant=False)"
        )


def _backward_number() -> int:
    """Which backward pass this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())
