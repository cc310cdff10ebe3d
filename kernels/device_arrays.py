"""What a GPU kernel is told of its arrays: address, count and type, read without any package.

Whatever has ``__cuda_array_interface__`` is taken: arrays of CuPy and numba, CUDA tensors of torch
(bfloat16 ones too, or as ``tensor.view(torch.uint16)``). Nothing here touches the device.
Sources: the CUDA Array Interface, version 3, in numba's documentation, which knows no bfloat16;
``Tensor.__cuda_array_interface__`` of torch, which calls it ``<V2``: two bytes of whatever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ucxgossip.errors import ArgumentError, ArrayError
from ucxgossip.kernels.contract import ITEMSIZE, check_pair

_KINDS = {
    **{"<f4": "float32", "<f8": "float64", "<f2": "float16"},
    **{"<u2": "bfloat16", "<V2": "bfloat16"},
}


@dataclass(frozen=True)
class Operand:
    """A 1-D contiguous array on a device. address: of its first element; count: elements."""

    address: int
    count: int
    kind: str

    @property
    def end(self) -> int:
        """Address of what follows the last element."""
        return self.address + self.count * ITEMSIZE[self.kind]


def operands(dst: object, src: object) -> tuple[Operand, Operand]:
    """`dst` and `src`, checked against each other; `ArrayError` where they are not served."""
    to, payload = _operand("dst", dst, writes=True), _operand("src", src, writes=False)
    check_pair(to.kind, payload.kind)
    if to.count != payload.count:
        raise ArrayError(f"mix_: dst has {to.count} elements but src has {payload.count}")
    if to.address < payload.end and payload.address < to.end:
        raise ArrayError("mix_: dst and src overlap")
    return to, payload


def distance_address(distance: object) -> int:
    """Address of the one float64 on the device to which the squared distance is added; 0: none."""
    if distance is None:
        return 0
    found = _operand("distance", distance, writes=True)
    if (found.kind, found.count) != ("float64", 1):
        raise ArrayError(f"mix_: distance is {found.count} of {found.kind}; must be one float64")
    return found.address


class _Bits:
    def __init__(self, array: Any) -> None:
        self._array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "typestr": "<u2"}


def as_bits(array: Any) -> Any:
    """`array`, as uint16 where it is torch's bfloat16, of whose type numba knows nothing."""
    return _Bits(array) if array.__cuda_array_interface__["typestr"] == "<V2" else array


def stream_handle(stream: object) -> int:
    """`stream` as the integer that CUDA knows it by; None is the default stream, 0."""
    if stream is None:
        return 0
    if not isinstance(stream, int | np.integer) or isinstance(stream, bool) or stream < 0:
        raise ArgumentError(
            f"mix_: stream is {stream!r}; must be the handle of a CUDA stream, an integer "
            "(torch: stream.cuda_stream; CuPy: stream.ptr)"
        )
    return int(stream)


def _operand(name: str, array: Any, writes: bool) -> Operand:
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except (KeyError, RuntimeError, TypeError) as error:  # torch: a gradient, a type of its own
        raise ArrayError(
            f"mix_: {name} does not give its address: {error!r} (detach() what needs a gradient; "
            "bfloat16 as tensor.view(torch.uint16))"
        ) from error
    if interface is None:
        raise ArrayError(
            f"mix_: {name} must be an array on a CUDA device, with __cuda_array_interface__, not "
            f"{type(array).__name__}"
        )
    shape, typestr = tuple(interface["shape"]), interface["typestr"]
    if typestr not in _KINDS:
        raise ArrayError(
            f"mix_: {name} is {typestr}; served are float32, float64, float16 and, as uint16, "
            "bfloat16"
        )
    kind, strides = _KINDS[typestr], interface.get("strides")
    if len(shape) != 1 or (
        strides is not None and shape[0] > 1 and tuple(strides) != (ITEMSIZE[kind],)
    ):
        raise ArrayError(f"mix_: {name} must be 1-D and contiguous, not shape {shape}")
    address, read_only = interface["data"]
    if writes and read_only:
        raise ArrayError(f"mix_: {name} is read-only")
    if address % ITEMSIZE[kind]:
        raise ArrayError(f"mix_: {name} starts at {address:#x}, no address of a {kind}")
    return Operand(int(address), int(shape[0]), kind)
