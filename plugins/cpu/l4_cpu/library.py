"""The compiled kernels: the library for this CPU, loaded once it is known to be what its sources say. ctypes lets go of the GIL in a call."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch  # its OpenMP runtime is loaded with it, and the kernels' threads are those

from l4_cpu.build_kernels import PACKAGE, library, sources_hash
from l4core.plugin_api import BackendUnavailable

FIX = "python -m l4_cpu.build_kernels"
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
Fields = list[tuple[str, type]]


def _fields(kind: type, names: str) -> Fields:
    return [(name, kind) for name in names.split()]


class Experts(ctypes.Structure):
    """`Experts` of csrc/api.h."""

    _fields_ = (
        *_fields(_POINTER, "x gate_up down shared_gate_up shared_down expert_ids score out"),
        *_fields(_INT64, "x_row num_rows num_experts hidden inter"),
        *_fields(_INT, "is_bf16 num_threads"),
    )


class NormRoute(ctypes.Structure):
    """`NormRoute` of csrc/api.h."""

    _fields_ = (
        *_fields(_POINTER, "stream update weight router normed expert_ids score"),
        *_fields(_INT64, "stream_row update_row num_rows num_experts hidden"),
        ("eps", ctypes.c_float),
        *_fields(_INT, "is_bf16 num_threads"),
    )


class Attention(ctypes.Structure):
    """`Attention` of csrc/api.h."""

    _fields_ = (
        *_fields(_POINTER, "q k v out cu_seqlens_q seq_lens block_table ancestors sees_prefix"),
        *_fields(_INT64, "q_row q_head out_row out_head k_page k_token k_head v_page v_token v_head table_row"),
        *_fields(_INT64, "num_seqs page_size num_q_heads num_kv_heads head_dim"),
        ("scale", ctypes.c_float),
        *_fields(_INT, "is_bf16 num_threads"),
    )


@functools.cache
def load(instructions: str, folder: Path = PACKAGE) -> ctypes.CDLL:
    """The library for this instruction set. Raises BackendUnavailable when it is not there, not loadable or not built from these sources."""
    path = library(instructions, folder)
    try:
        kernels = ctypes.CDLL(path.as_posix())
        kernels.l4_sources.restype = ctypes.c_char_p
        built_from = kernels.l4_sources().decode()
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"{path.name} cannot be loaded: {error}", fix=FIX) from error
    if built_from != sources_hash():
        raise BackendUnavailable(f"{path.name} was built from other sources ({built_from})", fix=FIX)
    if not kernels.l4_has_threads():
        raise BackendUnavailable(f"torch {torch.__version__} was built without OpenMP, whose threads the kernels use")
    kernels.l4_pack.argtypes = (_POINTER, _INT64, _INT64, _INT64, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    kernels.l4_experts.argtypes = (ctypes.POINTER(Experts),)
    kernels.l4_norm_route.argtypes = (ctypes.POINTER(NormRoute),)
    kernels.l4_attend.argtypes = (ctypes.POINTER(Attention),)
    for function in (kernels.l4_pack, kernels.l4_experts, kernels.l4_norm_route, kernels.l4_attend):
        function.restype = None
    return kernels
