"""Tensors to kernel arguments: strides, dtypes and grids. Host arithmetic only; nothing here looks at a value on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from l4_triton.kernels.decode import decode_kernel
from l4_triton.kernels.merge import merge_kernel
from l4_triton.kernels.prefill import prefill_kernel
from l4_triton.tiles import Tile
from l4core.plugin_api import AttentionMetadata, KVView

LOG2_E = 1.4426950408889634
FEW_SEQS = 32
"""Sequences up to which there may be few programs to merge, each with many parts: a long sequence alone has hundreds of parts and five rows."""


START = 3
"""Tiles that beginning an item is worth where there are more than FEW_SEQS sequences."""


def merge_block(num_seqs: int, head_dim: int) -> dict[str, int]:
    """Parts and dimensions that a program of the merge takes at a time."""
    if num_seqs > FEW_SEQS:
        return {"BLOCK_PARTS": 64, "DIMS": head_dim}
    return {"BLOCK_PARTS": 512, "DIMS": 16}


COMPILE = {"enable_fp_fusion": True}
"""Multiply and add in one rounding, said aloud: Triton's default for it changes in 3.10."""
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """Of a device. converts_fp8: by an instruction of NVIDIA's; else e4m3 is widened by moving bits.
    starts_early: kernels may be started before the one ahead has ended (kernels.early).
    interpreted: dots of bfloat16 are wrong under the interpreter, so made in float32."""

    converts_fp8: bool
    starts_early: bool
    interpreted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Partials:
    """Memory for what decode programs leave to the merge; used within one `decode` only. out: float32 [2 · programs, rows, head_dim].
    lse: float32 [2 · programs, rows]."""

    out: torch.Tensor
    lse: torch.Tensor

    @property
    def programs(self) -> int:
        return self.lse.shape[0] // 2


def new_partials(programs: int, rows: int, head_dim: int, device: torch.device | str) -> Partials:
    return Partials(
        out=torch.empty(2 * programs, rows, head_dim, dtype=torch.float32, device=device),
        lse=torch.empty(2 * programs, rows, dtype=torch.float32, device=device),
    )


def prefill(
    q: torch.Tensor,
    kv: KVView,
    meta: AttentionMetadata,
    out: torch.Tensor,
    tile: Tile,
    traits: Traits,
    lse: torch.Tensor | None = None,
) -> None:
    """q, out: [T, Hq, D], last stride 1.  lse: None, or float32 [T, Hq], contiguous, natural logarithm. Writes the rows of sequences with keys."""
    kv_heads = kv.k.shape[2]
    group = q.shape[1] // kv_heads
    grid = (kv_heads, q.shape[0] * group // tile.block_m + meta.num_seqs)
    arguments, constants = _common(q, kv, meta, out, lse, traits)
    prefill_kernel[grid](
        **arguments,
        **constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **COMPILE,
    )


def decode(
    q: torch.Tensor,
    kv: KVView,
    meta: AttentionMetadata,
    out: torch.Tensor,
    tile: Tile,
    traits: Traits,
    partials: Partials,
    min_tiles: int,
    lse: torch.Tensor | None = None,
) -> None:
    """The same for few rows a sequence and many keys. tile.block_m: at most the rows of `partials`; more rows become more blocks."""
    kv_heads = kv.k.shape[2]
    group = q.shape[1] // kv_heads
    rows = meta.max_seqlen_q * group
    items = kv_heads * triton.cdiv(rows, tile.block_m)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "MIN_TILES": min_tiles}
    blocks["START"] = START if meta.num_seqs > FEW_SEQS else 0
    arguments, constants = _common(q, kv, meta, out, lse, traits)
    early = {"PDL": True, "launch_pdl": True} if traits.starts_early else {"PDL": False}
    decode_kernel[(partials.programs,)](
        **arguments,
        **constants,
        **blocks,
        kv_heads=kv_heads,
        items=items,
        part_out=partials.out,
        part_lse=partials.lse,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **early,
        **COMPILE,
    )
    merge = merge_block(meta.num_seqs, constants["HEAD_DIM"])
    merge_kernel[(meta.num_seqs, items, min(rows, tile.block_m) * constants["HEAD_DIM"] // merge["DIMS"])](
        out,
        lse,
        partials.out,
        partials.lse,
        meta.cu_seqlens_q,
        meta.seq_lens,
        meta.num_seqs,
        kv_heads,
        partials.programs,
        out.stride(0),
        out.stride(1),
        **{name: constants[name] for name in ("GROUP", "HEAD_DIM", "CHUNK", "SEQS")},
        **blocks,
        **merge,
        num_warps=4,
        **early,
        **COMPILE,
    )


def dot_type(q: tl.dtype, fp8: bool) -> tl.dtype:
    """e4m3 becomes float16; bfloat16 would be a second conversion, and keep less of the queries and weights."""
    return tl.float16 if fp8 and q == tl.bfloat16 else q


def _common(
    q: torch.Tensor, kv: KVView, meta: AttentionMetadata, out: torch.Tensor, lse: torch.Tensor | None, traits: Traits
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that both kernels take."""
    fp8 = kv.k.dtype.itemsize == 1
    # Float32 queries: terms are added in the order of keys that are float32 themselves.
    pairs = fp8 and q.dtype != torch.float32
    k, v = (x.view(torch.uint16 if pairs else torch.uint8) if fp8 else x for x in (kv.k, kv.v))
    tree = meta.tree
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "cu_seqlens_q": meta.cu_seqlens_q,
        "seq_lens": meta.seq_lens,
        "block_table": meta.block_table,
        "ancestors": None if tree is None else tree.ancestors,
        "sees_prefix": None if tree is None else tree.sees_prefix,
        "k_scale": kv.k_scale,
        "v_scale": kv.v_scale,
        "scale_log2": q.shape[2] ** -0.5 * LOG2_E,
        "num_seqs": meta.num_seqs,
        "width": meta.block_table.shape[1],
        "stride_table": meta.block_table.stride(0),
        "stride_q_token": q.stride(0),
        "stride_q_head": q.stride(1),
        "stride_out_token": out.stride(0),
        "stride_out_head": out.stride(1),
        "stride_k_page": k.stride(0),
        "stride_k_slot": k.stride(1),
        "stride_k_head": k.stride(2),
        "stride_v_page": v.stride(0),
        "stride_v_slot": v.stride(1),
        "stride_v_head": v.stride(2),
    }
    constants = {
        "GROUP": q.shape[1] // kv.k.shape[2],
        "HEAD_DIM": q.shape[2],
        "PAGE": kv.k.shape[1],
        "CHUNK": 0 if meta.chunk is None else meta.chunk.size,
        "TREE": tree is not None,
        "PAIRS": pairs,
        "CONVERTS": traits.converts_fp8,
        "DOT_TYPE": tl.float32 if traits.interpreted else dot_type(_TYPES[q.dtype], fp8),
        "SEQS": _seqs(meta.num_seqs),
    }
    return arguments, constants


def _seqs(num_seqs: int) -> int:
    """A power of two, in steps of eight, so that few variants are compiled."""
    bound = 16
    while bound < num_seqs:
        bound *= 8
    return bound
