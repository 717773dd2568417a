"""What kernels do that are started while the one before still runs (programmatic dependent launch)."""

from __future__ import annotations

import functools

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from l4core.ops.device import COMPILE


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """Of a kernel with an argument PDL: whether it may be started while the kernel before it still runs, and waits for it by itself."""
    return {"PDL": True, "launch_pdl": True, **COMPILE} if _starts_early(x.device) else {"PDL": False, **COMPILE}


@functools.cache
def _starts_early(device: torch.device) -> bool:
    """NVIDIA from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start():
    """The next kernel may be started as soon as all programs of this one have said so; it waits for this one's end before it reads."""
    gdc_launch_dependents()


@triton.jit
def wait_for_last():
    """Until the kernel before has ended and its writes can be seen. Nothing that it writes or reads may be touched before."""
    gdc_wait()
