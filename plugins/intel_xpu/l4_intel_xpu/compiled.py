"""Finds out, by two tiny calls, whether the library really has kernels for these shapes.

A build without them does not fail: vllm-xpu-kernels catches its operator's error and goes on in slow Python, with one warning a process. So the
operators themselves are watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l4_intel_xpu.libraries import Library, Operands, Step
from l4core.plugin_api import AttentionContext, BackendUnavailable

ROWS = 17
"""Of the tiny prefill: past what a library would run as one-row decodes."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the errors that operators raise, also those that are caught by their caller."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.errors: list[Exception] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            self.errors.append(error)
            raise


def check_compiled(library: Library, context: AttentionContext, scale: torch.Tensor | None) -> None:
    """One decode and one prefill on a page of zeros. BackendUnavailable with the operator's own words when one of them fails.

    scale: float32 [] for fp8 KV, else None.
    """
    req = context.requirements
    for rows in (1, ROWS):
        watch = _Watch()
        what = f"{library.provider} has no working kernel for {'decode' if rows == 1 else 'prefill'}"
        try:
            with watch:
                library.attend(_step(rows, context.device), _operands(rows, context, scale), req.head_dim**-0.5)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise _refusal(what, error, context) from error
        if watch.errors:
            raise _refusal(what, watch.errors[0], context)


def _refusal(what: str, error: Exception, context: AttentionContext) -> BackendUnavailable:
    req = context.requirements
    words = " ".join(str(error).split()) or type(error).__name__
    return BackendUnavailable(
        f"{what} of {req.num_q_heads} query heads on {req.num_kv_heads} KV heads, head_dim {req.head_dim}, KV {req.kv_dtype}, "
        f"page size {context.page_size}: {words}",
        fix="choose another with --attention-backend, or build the library with this configuration",
    )


def _step(rows: int, device: str) -> Step:
    return Step(
        cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([rows], dtype=torch.int32, device=device),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        max_seqlen_q=rows,
        max_seqlen_k=rows,
    )


def _operands(rows: int, context: AttentionContext, scale: torch.Tensor | None) -> Operands:
    req = context.requirements
    q = torch.zeros(rows, req.num_q_heads, req.head_dim, dtype=getattr(torch, req.q_dtype), device=context.device)
    page = (1, context.page_size, req.num_kv_heads, req.head_dim)
    memory = torch.zeros(page, dtype=torch.uint8 if scale is not None else q.dtype, device=context.device)
    kv = memory.view(getattr(torch, req.kv_dtype))
    scales = scale.expand(1, req.num_kv_heads) if scale is not None else None
    return Operands(q=q, k=kv, v=kv, out=torch.empty_like(q), k_scale=scales, v_scale=scales)
