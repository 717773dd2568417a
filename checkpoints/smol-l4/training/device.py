"""Where training runs, and its log lines."""

from __future__ import annotations

import time

import torch


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """An accelerator with bfloat16 where there is one, else the CPU with float32."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (accelerator, torch.bfloat16) if accelerator is not None else (torch.device("cpu"), torch.float32)


def log(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)
