"""How the C library keeps memory in a process that computes on a CPU.

Left alone, glibc gives a step's large tensors back to the system as soon as they are freed and takes them anew in the next layer, page fault by page
fault; and weights that oneDNN packed lie in small pages. Both are settings of `malloc`, for the whole process; a user who has set any of them by
environment keeps them. Measured in docs/decisions/028-cpu-memory.md.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from l4core.model.huge_pages import advise

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER, DEFAULT_MMAPS = -1, 65536


@contextmanager
def packing_into_huge_pages(num_bytes: int) -> Iterator[None]:
    """What is allocated inside, up to num_bytes, is backed by huge pages where Linux has them."""
    libc = _malloc()
    if libc is None or num_bytes == 0:
        yield
        return
    _own_heap(libc)
    _advise_free_heap(libc, num_bytes)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, DEFAULT_MMAPS)  # a pool of keys and values has a mapping of its own


def keep_step_memory(num_bytes: int) -> None:
    """From now on freed memory stays the process's, to be used by the next step; the first num_bytes of it in huge pages."""
    libc = _malloc()
    if libc is not None:
        _own_heap(libc)
        _advise_free_heap(libc, num_bytes)


def _own_heap(libc: ctypes.CDLL) -> None:
    """All memory from the heap, and none of it given back."""
    libc.malloc_trim(0)  # what loading, or an engine before this one, has left
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def _advise_free_heap(libc: ctypes.CDLL, num_bytes: int) -> None:
    """Untouched memory is taken, advised and freed: the heap hands it out later, and the advice stays with its addresses."""
    address = libc.malloc(num_bytes)
    if address:
        advise(address, num_bytes)
        libc.free(address)


@functools.cache
def _malloc() -> ctypes.CDLL | None:
    """None where there is no glibc, or its user has settings of their own."""
    has_own = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or has_own:
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.malloc_trim.argtypes = (ctypes.c_size_t,)
    return libc
