"""RoPE, QK norm, temperature and KV write in one pass over q | k | v: a program a token and some heads.

Angles, temperature and the place in memory are worked out from positions and slots inside the kernel, so a step has no small launches for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from l4core.ops.heads import HeadRule
from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last
from l4core.plugin_api import KVView

FP8 = {torch.float8_e4m3fn: (3, 7), torch.float8_e5m2: (2, 15)}
"""Bits of the mantissa and bias of the exponent."""
FEW_TOKENS = 64
"""Up to this many tokens a program takes two heads, so that a decode's work is spread; else eight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonHeads:
    """positions: int64 [T].  slots: KV group name → int64 [T], page · page_size + offset.  tables: chunked? → cos and sin [rows, D/2, 2] float32,
    row p mod rows belongs to position p.  temperature: (floor_scale, attn_scale), None = off."""

    positions: torch.Tensor
    slots: Mapping[str, torch.Tensor]
    tables: Mapping[bool, torch.Tensor]
    temperature: tuple[int, float] | None

    def __call__(
        self, qkv: torch.Tensor, rule: HeadRule, group: str, pages: torch.Tensor, view: KVView
    ) -> torch.Tensor:
        num_tokens, num_heads = qkv.shape[0], rule.num_q_heads + 2 * rule.num_kv_heads
        if qkv.stride(1) != 1 or pages.stride(-1) != 1:
            raise ValueError(f"strides of qkv {qkv.stride()} and pages {pages.stride()} must end with 1")
        table = self.tables[rule.chunked] if rule.rope else None
        floor_scale, attn_scale = (0, 0.0) if rule.rope or self.temperature is None else self.temperature
        is_fp8 = pages.dtype.itemsize == 1
        if is_fp8 and pages.dtype not in FP8:
            raise ValueError(f"KV is {pages.dtype}; wanted one of {', '.join(map(str, FP8))} or a wider float")
        mantissa, bias = FP8.get(pages.dtype, (0, 0))
        block_heads = 2 if num_tokens <= FEW_TOKENS else 8
        if num_tokens > 0:
            _heads_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
                qkv,
                self.positions,
                self.slots[group],
                table,
                pages.view(torch.uint8) if is_fp8 else pages,
                view.k_scale if is_fp8 else None,
                view.v_scale if is_fp8 else None,
                qkv.stride(0),
                pages.stride(0),
                pages.stride(1),
                pages.stride(2),
                pages.stride(3),
                attn_scale,
                rule.qk_norm_eps,
                NUM_Q=rule.num_q_heads,
                NUM_KV=rule.num_kv_heads,
                HEAD_DIM=rule.head_dim,
                PAGE=pages.shape[2],
                NUM_ANGLES=1 if table is None else table.shape[0],
                FLOOR_SCALE=floor_scale,
                MANTISSA=mantissa,
                BIAS=bias,
                LARGEST=torch.finfo(pages.dtype).max,
                BLOCK_HEADS=block_heads,
                BLOCK_DIM=triton.next_power_of_2(rule.head_dim),
                num_warps=block_heads // 2,
                **launch_options(qkv),
            )
        return qkv.view(num_tokens, num_heads, rule.head_dim)[:, : rule.num_q_heads]


@triton.jit
def _heads_kernel(
    qkv,
    positions,
    slots,
    table,
    pages,
    k_scale,
    v_scale,
    stride_token,
    stride_page,
    stride_value,
    stride_slot,
    stride_head,
    attn_scale,
    eps,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_ANGLES: tl.constexpr,
    FLOOR_SCALE: tl.constexpr,  # 0 = no temperature
    MANTISSA: tl.constexpr,  # 0 = no fp8
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_DIM)
    is_q, is_v = head < NUM_Q, head >= NUM_Q + NUM_KV
    inside = (head < NUM_Q + 2 * NUM_KV)[:, None] & (dim < HEAD_DIM)[None, :]
    source = qkv + token * stride_token + head[:, None] * HEAD_DIM + dim[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + token).to(tl.int32)  # a context of 2³¹ tokens is far off, 64-bit division is slow

    y = x
    if table is not None:
        angles = tl.load(table + position % NUM_ANGLES * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        cos, sin = tl.split(tl.reshape(angles, [BLOCK_DIM // 2, 2]))
        even, odd = tl.split(tl.reshape(x, [BLOCK_HEADS, BLOCK_DIM // 2, 2]))
        turned = tl.join(even * cos[None, :] - odd * sin[None, :], even * sin[None, :] + odd * cos[None, :])
        y = tl.reshape(turned, [BLOCK_HEADS, BLOCK_DIM])
    if eps is not None:
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / HEAD_DIM + eps)[:, None]
    if FLOOR_SCALE > 0:
        steps = ((position + 1) // FLOOR_SCALE).to(tl.float32)
        y = tl.where(is_q[:, None], y * (tl.log(1.0 + steps) * attn_scale + 1.0), y)
    y = tl.where(is_v[:, None], x, y)
    tl.store(source, y.to(qkv.dtype.element_ty), mask=inside & is_q[:, None])

    slot = tl.load(slots + token)
    kv_head = head - NUM_Q
    target = pages + slot // PAGE * stride_page + slot % PAGE * stride_slot
    target = target + (kv_head >= NUM_KV)[:, None] * stride_value + (kv_head % NUM_KV)[:, None] * stride_head
    if MANTISSA > 0:
        if k_scale is not None:
            scale = tl.where(is_v, tl.load(v_scale), tl.load(k_scale))
            y = tl.math.div_rn(y, tl.broadcast_to(scale[:, None], [BLOCK_HEADS, BLOCK_DIM]))
        stored = _to_fp8(y, MANTISSA, BIAS, LARGEST)
    else:
        stored = y.to(pages.dtype.element_ty)
    tl.store(target + dim[None, :], stored, mask=inside & (kv_head >= 0)[:, None])


@triton.jit
def _to_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """float32 → the bits of an 8-bit float, rounded to even, saturated, NaN kept. In integers, because not every target can convert."""
    CUT: tl.constexpr = 23 - MANTISSA
    SMALLEST: tl.constexpr = 2.0 ** (1 - BIAS)  # normal
    ROUNDER: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)  # adding it rounds to multiples of the smallest subnormal
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), LARGEST)
    wide = size.to(tl.int32, bitcast=True)
    normal = ((wide + ((1 << (CUT - 1)) - 1) + ((wide >> CUT) & 1)) >> CUT) - ((127 - BIAS) << MANTISSA)
    small = (size + ROUNDER).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < SMALLEST, small, normal)
    return (tl.where(x != x, 0x7F, code) | sign).to(tl.uint8)
