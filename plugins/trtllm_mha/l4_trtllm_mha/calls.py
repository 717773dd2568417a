"""FlashInfer's two entry points, held to the signature this plugin was written for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from l4_trtllm_mha.probe import FIX
from l4core.plugin_api import BackendUnavailable, KVView

DECODE = frozenset(
    {"query", "kv_cache", "workspace_buffer", "block_tables", "seq_lens", "max_seq_len", "bmm1_scale", "bmm2_scale"}
    | {"out", "kv_layout", "backend", "q_len_per_req", "max_q_len", "cum_seq_lens_q"}
)
CONTEXT = frozenset(
    {"query", "kv_cache", "workspace_buffer", "block_tables", "seq_lens", "max_q_len", "max_kv_len", "bmm1_scale"}
    | {"bmm2_scale", "batch_size", "cum_seq_lens_q", "cum_seq_lens_kv", "out", "kv_layout", "causal", "lse"}
)
COUNTERS = "multi_ctas_kv_counter_buffer"
"""Taken by newer versions: counters that a launch leaves at zero, so that none is allocated inside a graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """decode, context: FlashInfer's functions.  counters: whether both take COUNTERS."""

    decode: Callable[..., Any]
    context: Callable[..., Any]
    counters: bool


def find_calls() -> Calls:
    """BackendUnavailable when FlashInfer does not import, or its functions lack an argument."""
    try:
        decode = importlib.import_module("flashinfer.decode").trtllm_batch_decode_with_kv_cache
        context = importlib.import_module("flashinfer.prefill").trtllm_batch_context_with_kv_cache
    except (ImportError, OSError, AttributeError) as error:
        raise BackendUnavailable(f"flashinfer cannot be used: {error}", fix=FIX) from error
    known = [_parameters(decode, DECODE), _parameters(context, CONTEXT)]
    return Calls(decode=decode, context=context, counters=all(COUNTERS in names for names in known))


def _parameters(function: Callable[..., Any], needed: frozenset[str]) -> set[str]:
    names = set(inspect.signature(function).parameters)
    missing = sorted(needed - names)
    if missing:
        raise BackendUnavailable(f"flashinfer's {function.__name__} has no argument {', '.join(missing)}", fix=FIX)
    return names


def check_strides(kv: KVView) -> None:
    """FlashInfer hands the kernels the strides of the keys for the values too. ValueError when they differ."""
    if kv.k.stride() != kv.v.stride():
        raise ValueError(f"keys have strides {kv.k.stride()} and values {kv.v.stride()}; these kernels want the same")
