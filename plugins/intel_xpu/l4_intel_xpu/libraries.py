"""The two libraries behind one call. Their functions are bound by inspection: a version that lacks an argument we need is refused by its name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from l4_intel_xpu.probe import FIX, PROVIDERS
from l4core.plugin_api import BackendUnavailable

LONGEST_REWRITTEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a call needs beside queries, memory and output: int32 [B+1], [B], [B, W] on the device, and the host bounds."""

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """One layer's. q, out: [T, num_q_heads, head_dim].  k, v: dense pages.  k_scale, v_scale: float32 [B, num_kv_heads], views of one element each,
    None unless KV is fp8."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


Arguments = Callable[[Step, Operands, float], dict[str, object]]


def vllm_arguments(step: Step, x: Operands, scale: float) -> dict[str, object]:
    """vllm_xpu_kernels.flash_attn_varlen_func. It takes a batch of T = B · max_seqlen_q rows with at most 16 each for a uniform one, padding rows
    included, and cuts it accordingly; a bound past 16 keeps it to the lengths it is given. Unmixed: every row through one kernel, since the mixed
    way runs sequences without a row as decodes over their neighbour's."""
    rows = step.max_seqlen_q
    return {
        "q": x.q,
        "k": x.k,
        "v": x.v,
        "out": x.out,
        "cu_seqlens_q": step.cu_seqlens_q,
        "seqused_k": step.seq_lens,
        "block_table": step.block_table,
        "max_seqlen_q": rows if rows == 1 else max(rows, LONGEST_REWRITTEN + 1),
        "max_seqlen_k": step.max_seqlen_k,
        "softmax_scale": scale,
        "causal": True,
        "k_descale": x.k_scale,
        "v_descale": x.v_scale,
        "is_mix_batch": False,
    }


def sgl_arguments(step: Step, x: Operands, scale: float) -> dict[str, object]:
    """sgl_kernel.flash_attn.flash_attn_with_kvcache of the XPU build."""
    return {
        "q": x.q,
        "k_cache": x.k,
        "v_cache": x.v,
        "out": x.out,
        "cu_seqlens_q": step.cu_seqlens_q,
        "cache_seqlens": step.seq_lens,
        "page_table": step.block_table,
        "max_seqlen_q": step.max_seqlen_q,
        "max_seqlen_k": step.max_seqlen_k,
        "softmax_scale": scale,
        "causal": True,
        "k_descale": x.k_scale,
        "v_descale": x.v_scale,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """provider: its import name.  call: its attention function.  arguments: of a call, by the function's own names."""

    provider: str
    call: Callable[..., Any]
    arguments: Arguments

    def attend(self, step: Step, operands: Operands, scale: float) -> None:
        self.call(**self.arguments(step, operands, scale))


FUNCTIONS: Mapping[str, tuple[str, str, Arguments]] = {
    "vllm_xpu_kernels": ("vllm_xpu_kernels", "flash_attn_varlen_func", vllm_arguments),
    "sgl_kernel": ("sgl_kernel.flash_attn", "flash_attn_with_kvcache", sgl_arguments),
}
"""Provider → module, function, our arguments."""


def candidates(named: str | None) -> list[str]:
    """Providers to try, in order. BackendUnavailable for a name that is none."""
    names = [provider.module for provider in PROVIDERS]
    if named is None:
        return names
    if named not in names:
        raise BackendUnavailable(
            f"provider is {named!r}; wanted one of {', '.join(names)}", fix=f"--attention-option provider={names[0]}"
        )
    return [named]


def load(provider: str) -> Library:
    """BackendUnavailable when it does not import, has no such function, or the function lacks an argument."""
    module, name, arguments = FUNCTIONS[provider]
    try:
        call = getattr(importlib.import_module(module), name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise BackendUnavailable(f"{provider}: {type(error).__name__}: {error}", fix=FIX) from error
    missing = _missing(call, arguments)
    if missing:
        raise BackendUnavailable(f"{provider}: {name} takes no argument {', '.join(missing)}", fix=FIX)
    return Library(provider=provider, call=call, arguments=arguments)


def _missing(call: Callable[..., Any], arguments: Arguments) -> list[str]:
    nothing = torch.empty(0)
    step = Step(cu_seqlens_q=nothing, seq_lens=nothing, block_table=nothing, max_seqlen_q=1, max_seqlen_k=1)
    operands = Operands(q=nothing, k=nothing, v=nothing, out=nothing, k_scale=None, v_scale=None)
    known = inspect.signature(call).parameters
    return [name for name in arguments(step, operands, 1.0) if name not in known]
