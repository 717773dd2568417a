"""Weights in huge pages: a decode streams all of them once a step, and 4 KB pages then cost a translation miss every few rows."""

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
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advised = 0
    for param in params:
        if not param.is_cpu:
            continue
        begin = -(-param.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = (param.data_ptr() + param.nbytes - begin) // HUGE_PAGE * HUGE_PAGE
        if size > 0 and madvise(begin, size, MADV_HUGEPAGE) == 0:
            advised += size
    return advised
