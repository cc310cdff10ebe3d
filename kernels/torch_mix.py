"""The mix by torch's own `lerp_`: the baseline that the other kernels are measured beside.

It serves torch tensors of every device. It is no keeper of the whole contract: `lerp_` rounds by a
formula of its own (last digits differ), payloads of other types are widened by a copy, and the
squared distance takes passes and temporary memory. The methods of the tensors are all that is
used, so that this module needs no import of torch. On CUDA untested on hardware.
"""

from __future__ import annotations

from typing import Any

from ucxgossip.errors import ArgumentError, ArrayError
from ucxgossip.kernels.contract import check_alpha, check_pair


def mix_(
    dst: Any, src: Any, alpha: float, *, distance: Any = None, stream: None = None
) -> float | None:
    """``dst.lerp_(src, alpha)`` (`contract.Mix`), on torch's current stream.

    dst, src: 1-D contiguous tensors of one device and length (`ArrayError` else). distance: a
    tensor of one float64, to which the squared distance is added. Returns the squared distance on
    the CPU; on a GPU None.
    """
    kinds = []
    for name, tensor in (("dst", dst), ("src", src)):
        if not hasattr(tensor, "lerp_"):
            raise ArrayError(f"mix_: {name} must be a torch tensor, not {type(tensor).__name__}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ArrayError(
                f"mix_: {name} must be 1-D and contiguous, not shape {tuple(tensor.shape)}"
            )
        kinds.append(str(tensor.dtype).removeprefix("torch."))
    check_pair(*kinds)
    if dst.shape != src.shape or dst.device != src.device:
        raise ArrayError(
            f"mix_: dst is {tuple(dst.shape)} on {dst.device}, src {tuple(src.shape)} on "
            f"{src.device}"
        )
    if stream is not None:
        raise ArgumentError("mix_: torch's own kernels run on its current stream; leave stream out")
    weight = check_alpha(alpha)
    on_cpu = dst.device.type == "cpu"
    payload = src.to(dst.dtype)
    squared = None
    if on_cpu or distance is not None:
        squared = (payload.double() - dst.double()).square().sum()
    dst.lerp_(payload, weight)
    if distance is not None:
        distance += squared
    return float(squared) if on_cpu and squared is not None else None
