"""Kernels that are started while the one ahead still runs, and wait for its end by themselves (NVIDIA, from Hopper on).

Between the start and the wait a kernel may read only what is older than the kernel ahead: the lengths and tables of a step. Every program waits, also
one that has nothing to do: a kernel is over when its programs are, and whoever waits for it relies on all that came before.
"""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start():
    gdc_launch_dependents()


@triton.jit
def wait_for_last():
    gdc_wait()
