"""Buckets: parameters and gradients laid out flat in registered memory, or in a device's arena.

A parameter's data becomes a view into its bucket, so that what is put is what the optimizer
wrote, and what is mixed is what the next forward reads: no copy in the step. Gradients likewise,
as long as they are accumulated into their views.

On a device the arena is plain memory of our own (`ucxgossip.device`), which lives as long as a
tensor views it. Nothing here asks which device it is, so that tests bring one of their own.

Rejected: registering torch's own tensors (they are scattered, freed and reused by its allocator);
DDP's ``bucket.buffer()`` (DDP rebuilds its buckets after the first iteration).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.device import Device
from ucxgossip.errors import ArrayError, ModelError
from ucxgossip.group import Group
from ucxgossip.mixing import DeviceArray, Stream

ALIGNMENT = 64
"""Bytes to which each tensor is aligned in its bucket."""

DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


def dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one span of memory, in any order of dimensions."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def check_parameter(name: str, parameter: torch.Tensor) -> None:
    """`ArrayError` for a parameter that cannot live in a bucket."""
    if parameter.layout != torch.strided:
        raise ArrayError(f"parameter {name} has layout {parameter.layout}; it must be strided")
    if parameter.dtype not in DTYPES:
        raise ArrayError(
            f"parameter {name} is {parameter.dtype}; float32 and float64 are served. Convert the "
            "model with model.float()"
        )


class Flat:
    """One span of memory and the views of tensors in it.

    buffer: what rounds on the CPU are posted with; on_device: what those on a device are, None on
    the CPU. array: the span as NumPy sees it, on the CPU only.
    """

    def __init__(
        self, group: Group, tensors: Sequence[torch.Tensor], device: Device | None = None
    ) -> None:
        dtype = tensors[0].dtype
        self.dtype = DTYPES[dtype]
        step = ALIGNMENT // self.dtype.itemsize
        offsets, count = [], 0
        for tensor in tensors:
            offsets.append(count)
            count += -(-tensor.numel() // step) * step
        self.count = max(count, step)
        nbytes = self.count * self.dtype.itemsize
        self.array: NDArray[Any] = np.empty(0, self.dtype)
        self.on_device: DeviceArray | None = None
        if device is None:
            region = group.allocate(nbytes)
            self.array = region.view(self.dtype, self.count)
            self.tensor = torch.from_numpy(self.array)
            self.buffer = Buffer.of(self.array, region)
        else:
            memory = device.allocate(nbytes)
            self.on_device = DeviceArray(device, memory, self.dtype, self.count)
            view = memory.view(self.dtype, self.count)
            self.tensor = torch.as_tensor(view, device=tensors[0].device)
            self.buffer = self.on_device.buffer
        self.views = [
            self.tensor.as_strided(tensor.shape, tensor.stride(), offset)
            if dense(tensor)
            else self.tensor[offset : offset + tensor.numel()].view(tensor.shape)
            for tensor, offset in zip(tensors, offsets, strict=True)
        ]

    def read(self) -> NDArray[Any]:
        """The values in host memory: the span itself on the CPU, a copy from a device."""
        return self.array if self.on_device is None else self.on_device.read()

    def write(self, values: NDArray[Any]) -> None:
        """Put values that `read` gave, and were changed, in their place."""
        if self.on_device is not None:
            self.on_device.write(values)

    def give_back(self, group: Group) -> None:
        """Deregister the span, of which no round is under way; its views stay valid."""
        if self.on_device is None:
            group.free(self.buffer)


class Bucket:
    """Some parameters of one dtype: their weights, gradients and the streams of both.

    weights: the parameters' data, as views (kept by `adopt` until `release`). gradients: the same
    for ``.grad``, or None where gradients do not travel. weights_stream, gradients_stream: how
    they are exchanged; None where they are not.
    """

    def __init__(
        self,
        group: Group,
        parameters: Sequence[torch.nn.Parameter],
        gradients_travel: bool,
        device: Device | None = None,
    ) -> None:
        self.parameters, self.device = list(parameters), device
        self.weights = Flat(group, self.parameters, device)
        self.gradients = Flat(group, self.parameters, device) if gradients_travel else None
        self.weights_stream: Stream | None = None
        self.gradients_stream: Stream | None = None
        self.waiting = len(self.parameters)
        self.received = [False] * len(self.parameters)
        self.posted = False
        self._places = [view.data_ptr() for view in self.weights.views]

    def adopt(self) -> None:
        """Move the parameters' data into the bucket."""
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self.weights.views, strict=True):
                view.copy_(parameter.data)
                parameter.data = view

    def release(self) -> None:
        """Give the parameters and their gradients memory of their own again."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()
                if self.gradients is not None and parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def give_back(self, group: Group, streams: bool) -> None:
        """After `release`: memory, and the streams' mailboxes, for others to have."""
        for stream in (self.gradients_stream, self.weights_stream):
            if streams and stream is not None:
                stream.give_back()  # which refuses while a round is under way
        for flat in (self.weights, self.gradients):
            if flat is not None:
                flat.give_back(group)

    def moved(self) -> torch.nn.Parameter | None:
        """A parameter whose data is no longer where `adopt` put it, if there is one."""
        for parameter, place in zip(self.parameters, self._places, strict=True):
            if parameter.data_ptr() != place:
                return parameter
        return None

    def reset_gradients(self, held: set[int]) -> None:
        """Zero gradients in place of dropping them, so that backward writes here.

        held: ids of the parameters to reset, those of one optimizer.
        """
        if self.gradients is None:
            return
        whole = all(id(parameter) in held for parameter in self.parameters)
        if whole:
            self.gradients.tensor.zero_()
        for parameter, view in zip(self.parameters, self.gradients.views, strict=True):
            if id(parameter) in held and parameter.requires_grad:
                if not whole:
                    view.zero_()
                parameter.grad = view

    def zero_gradients(self) -> None:
        """As `reset_gradients` of all parameters."""
        assert self.gradients is not None
        self.gradients.tensor.zero_()
        for parameter, view in zip(self.parameters, self.gradients.views, strict=True):
            wanted = view if parameter.requires_grad else None
            if parameter.grad is not wanted:
                parameter.grad = wanted

    def set_zero(self) -> None:
        """Make every gradient zero where it is."""
        if self.gradients is not None:
            self.gradients.tensor.zero_()

    def start_backward(self) -> None:
        """Expect one gradient for each parameter."""
        self.waiting = len(self.parameters)
        self.received = [False] * len(self.parameters)
        self.posted = False

    def receive(self, index: int) -> bool:
        """Note that parameter `index` has its gradient; whether the bucket is complete."""
        self.take_in(index)
        return self.waiting == 0 if self.received[index] else self.note(index)

    def note(self, index: int) -> bool:
        """As `receive`, for a first gradient that is in the bucket."""
        self.received[index] = True
        self.waiting -= 1
        return self.waiting == 0

    def take_in(self, index: int) -> None:
        """Make the gradient of parameter `index` live in the bucket; zeros where there is none.

        A gradient that autograd put elsewhere (after ``model.zero_grad()``, say) is copied.
        """
        assert self.gradients is not None
        parameter, view = self.parameters[index], self.gradients.views[index]
        gradient = parameter.grad
        with torch.no_grad():
            if gradient is None:
                view.zero_()
            elif gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient)
        parameter.grad = view


def partition(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], limit: int
) -> list[list[torch.nn.Parameter]]:
    """Split parameters, in order, into runs of one dtype of at most `limit` bytes each.

    A parameter larger than `limit` stands alone. `ModelError` where there is none.
    """
    runs: list[list[torch.nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        check_parameter(name, parameter)
        nbytes = parameter.numel() * parameter.element_size()
        if not runs or runs[-1][-1].dtype != parameter.dtype or size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(parameter)
        size += nbytes
    if not runs:
        raise ModelError("the model has no parameter that requires a gradient; nothing to mix")
    return runs
