"""Which device a model lives on, and what of `attach` works there.

A model is on the CPU, or as a whole on one CUDA device. Everything that is missing or does not fit
is named before anything changes. On CUDA all of this is untested on hardware.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ucxgossip.device import Device, driver
from ucxgossip.device.admission import check_installed
from ucxgossip.device.cuda import open_device
from ucxgossip.errors import ArgumentError, ArrayError, NoDeviceError
from ucxgossip.mixing import Modes
from ucxgossip.ucp import lib


def device_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Device | None:
    """The device that all of a model's named parameters and buffers are on; None for the CPU.

    `ArrayError`: on several, or on one that is not served; `NoDeviceError`, `MissingExtraError`,
    `CudaVersionError`: what `device.admission` misses.
    """
    first_name, found = "", torch.device("cpu")
    for name, tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda"):
            raise ArrayError(
                f"{name} is on {tensor.device}; models on the CPU and on CUDA devices are served. "
                "Move the model with model.cpu() before attach"
            )
        if not first_name:
            first_name, found = name, tensor.device
        elif tensor.device != found:
            raise ArrayError(
                f"{first_name} is on {found} but {name} is on {tensor.device}; all parameters and "
                "buffers of a model must be on one device. Move it with model.to(device) before "
                "attach"
            )
    return None if found.type == "cpu" else open_cuda(found.index or 0)


def open_cuda(ordinal: int) -> Device:
    """CUDA device `ordinal`, with torch's current stream as that of whoever computes.

    `NoDeviceError` where torch is built without CUDA, and else as `device_of`.
    """
    _check_torch()

    def current_stream() -> int:
        return int(torch.cuda.current_stream(ordinal).cuda_stream)

    origin = lib.load().origin
    return open_device(ordinal, current_stream, origin, reclaim=torch.cuda.empty_cache)


def check_cuda() -> None:
    """What `open_cuda` refuses for any device; makes no context.

    `NoDeviceError`, `MissingExtraError`, `CudaVersionError`.
    """
    _check_torch()
    check_installed(driver.load(), lib.load().origin)


def _check_torch() -> None:
    if torch.version.cuda is None:
        raise NoDeviceError(
            "torch is built for the CPU only; install a build for CUDA (see pytorch.org), then "
            "pip install 'ucxgossip[cu12]' (or [cu13])"
        )


def check_modes(modes: Modes, device: Device) -> None:
    """`ArgumentError` for what works on the CPU only."""
    for wrong, said in (
        (modes.mix == "push_sum", "mix='push_sum'"),
        (modes.staleness > 0, f"staleness={modes.staleness}"),
        (modes.outer is not None, "outer"),
        (modes.buffers, "buffers=True"),
        (modes.noise_correction, "noise_correction=True"),
    ):
        if wrong:
            raise ArgumentError(
                f"{said} works for models on the CPU only, and this one is on {device.name}. On "
                "CUDA: mix='both', 'weights' or 'gradients', combine='atc' or 'awc', "
                "optimizer_state, local_steps and global_average_every"
            )
