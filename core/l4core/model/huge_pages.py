"""A CPU's weights, keys and values in huge pages: a decode streams them once a step, and 4 KB pages cost a translation miss every few rows."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch

HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14


def advise_huge_pages(params: Iterable[torch.Tensor]) -> int:
    """Asks Linux to back CPU tensors with huge pages; to be called before they are first written. → bytes the kernel agreed to try.

    A hint: elsewhere, or where the kernel has transparent huge pages off, it changes nothing and returns 0.
    """
    return sum(advise(param.data_ptr(), param.nbytes) for param in params if param.is_cpu)


def advise(address: int, num_bytes: int) -> int:
    """The same for the whole huge pages of [address, address + num_bytes)."""
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    begin = -(-address // HUGE_PAGE) * HUGE_PAGE
    size = (address + num_bytes - begin) // HUGE_PAGE * HUGE_PAGE
    return size if size > 0 and madvise(begin, size, MADV_HUGEPAGE) == 0 else 0
