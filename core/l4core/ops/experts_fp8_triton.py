"""SwiGLU experts on e4m3 weights with one scale an output: the twin of experts_int4_triton, in the same modes.

Two ways to read x. Few rows: x stays as it is and a weight is widened in registers, since memory is the limit and nothing has to be quantised first.
Many rows (A8): x is e4m3 with a scale a row, and the tensor core multiplies the bytes themselves, at twice the rate; the router's score goes into the
row's scale. A float32 model, and Triton's interpreter, multiply what the bytes stand for. Weights lie as in a checkpoint, out by in: weight
[E, N, K], scale float32 [E, N].
"""

from __future__ import annotations

import triton
import triton.language as tl

from l4core.ops.expert_rows_triton import ALL, FEW, add_parts, find_rows, is_last, weight_of
from l4core.ops.overlap_triton import let_next_start, wait_for_last


@triton.jit
def widen(w, A8: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr):
    """e4m3 → DOT, exactly. ASM, for bfloat16: the bits move to their places, and 2^120 makes up for the other exponent bias."""
    if A8 and (tl.float32 != DOT):
        return w
    elif ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b, s, t, big, zero; mov.b32 big, 0x7b807b80; mov.b32 zero, 0x80008000;"
            " prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
            " and.b32 s, a, 0x7fff7fff; shr.u32 s, s, 4; lop3.b32 a, a, 0x80008000, s, 0xea; fma.rn.bf16x2 $0, a, big, zero;"
            " and.b32 t, b, 0x7fff7fff; shr.u32 t, t, 4; lop3.b32 b, b, 0x80008000, t, 0xea; fma.rn.bf16x2 $1, b, big, zero;}",
            "=r,=r,r", [w.to(tl.int8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return w.to(DOT)


@triton.jit
def narrow_rows(xp, rows, k, K, inside, EVEN_K: tl.constexpr, A8: tl.constexpr, DOT: tl.constexpr):
    """x as the right operand, [BLOCK_K, BLOCK_T]."""
    here = inside[:, None]
    if not EVEN_K:
        here = here & (k < K)[None, :]
    x = tl.load(xp, mask=here, other=0.0)
    if not A8 or (tl.float32 == DOT):
        x = x.to(DOT)
    return x.T


@triton.jit
def load_weight(wp, k, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(wp)
    else:
        return tl.load(wp, mask=(k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def fp8_gate_up(
    x, x_scale, weight, scales, shared_weight, shared_scales, ids, order, ends, score, out, sums, counters,
    num_tokens, x_stride, n_blocks, K, inter,
    MODE: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr, A8: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[p] = silu(s·g) · (s·u), [rows, inter]; see int4_gate_up. x_scale float32 [T], with A8."""
    pid, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        let_next_start()
        wait_for_last()
    expert, rows, tokens, inside, block, _ = find_rows(
        MODE, pid, ids, order, ends, num_tokens, n_blocks, E, SHARED, BLOCK_E, BLOCK_T
    )
    if expert < 0:
        return
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    part_k = (K + BLOCK_K * PARTS - 1) // (BLOCK_K * PARTS) * BLOCK_K
    k = part * part_k + tl.arange(0, BLOCK_K)
    half = inter.to(tl.int64) * K
    wp = weight_of(MODE, weight, shared_weight, expert, half * 2, E, SHARED)
    sp = weight_of(MODE, scales, shared_scales, expert, 2 * inter, E, SHARED) + n
    wp = wp + n.to(tl.int64)[:, None] * K + k[None, :]
    xp = x + tokens.to(tl.int64)[:, None] * x_stride + k[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for _ in range(0, part_k, BLOCK_K):
        xk = narrow_rows(xp, rows, k, K, inside, EVEN_K, A8, DOT)
        gate = tl.dot(widen(load_weight(wp, k, K, EVEN_K), A8, ASM, DOT), xk, gate, input_precision="ieee")
        up = tl.dot(widen(load_weight(wp + half, k, K, EVEN_K), A8, ASM, DOT), xk, up, input_precision="ieee")
        wp += BLOCK_K
        xp += BLOCK_K
        k += BLOCK_K
    gate *= tl.load(sp)[:, None]
    up *= tl.load(sp + inter)[:, None]
    if PARTS > 1:
        at = rows.to(tl.int64)[None, :] * (2 * inter) + n[:, None]
        size = (1 + SHARED) * num_tokens.to(tl.int64) * (2 * inter)
        tl.store(sums + part * size + at, gate, mask=inside[None, :])
        tl.store(sums + part * size + at + inter, up, mask=inside[None, :])
        if not is_last(counters + pid, PARTS):
            return
        gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for i in tl.static_range(PARTS):
            gate += tl.load(sums + i * size + at, mask=inside[None, :], other=0.0, cache_modifier=".cg")
            up += tl.load(sums + i * size + at + inter, mask=inside[None, :], other=0.0, cache_modifier=".cg")
    s = tl.full((BLOCK_T,), 1.0, tl.float32)
    if MODE != ALL:
        s = tl.load(score + tokens, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(expert == E, 1.0, s)
    if A8:
        s *= tl.load(x_scale + tokens, mask=inside, other=0.0)
    gate *= s[None, :]
    up *= s[None, :]
    done = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + rows.to(tl.int64)[None, :] * inter + n[:, None], done.to(out.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def fp8_down(
    x, x_scale, weight, scales, shared_weight, shared_scales, ids, order, ends, out, sums, counters,
    num_tokens, x_stride, n_blocks, K, hidden,
    MODE: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr, A8: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, hidden] = the sum over a token's experts of W · x[p]; see int4_down. x_scale float32 [rows], with A8. With ALL it is a linear layer."""
    pid, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        let_next_start()
        wait_for_last()
    expert, rows, tokens, inside, block, working = find_rows(
        MODE, pid, ids, order, ends, num_tokens, n_blocks, E, SHARED, BLOCK_E, BLOCK_T
    )
    if expert < 0:
        return
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    part_k = (K + BLOCK_K * PARTS - 1) // (BLOCK_K * PARTS) * BLOCK_K
    k = part * part_k + tl.arange(0, BLOCK_K)
    wp = weight_of(MODE, weight, shared_weight, expert, hidden.to(tl.int64) * K, E, SHARED)
    sp = weight_of(MODE, scales, shared_scales, expert, hidden, E, SHARED) + n
    wp = wp + n.to(tl.int64)[:, None] * K + k[None, :]
    xp = x + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for _ in range(0, part_k, BLOCK_K):
        xk = narrow_rows(xp, rows, k, K, inside, EVEN_K, A8, DOT)
        acc = tl.dot(widen(load_weight(wp, k, K, EVEN_K), A8, ASM, DOT), xk, acc, input_precision="ieee")
        wp += BLOCK_K
        xp += BLOCK_K
        k += BLOCK_K
    acc *= tl.load(sp)[:, None]
    if A8:
        acc *= tl.load(x_scale + rows, mask=inside, other=0.0)[None, :]
    kept = inside
    if (MODE == FEW) | (PARTS > 1):
        wanted, counter = PARTS, counters + pid
        if MODE == FEW:
            wanted, counter = PARTS * (working + SHARED), counters + block
        last, acc, kept = add_parts(
            MODE, ids, sums, acc, rows, tokens, inside, n, part, num_tokens, hidden, counter, wanted, SHARED, PARTS, BLOCK_N, BLOCK_T
        )  # fmt: skip
        if not last:
            return
    to = out + tokens.to(tl.int64)[None, :] * hidden + n[:, None]
    if ADD:
        acc += tl.load(to, mask=kept[None, :], other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=kept[None, :])


@triton.jit
def quantise_rows_kernel(x, out, scale, size, x_stride, largest: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: out = x / s, s = max|x| / largest."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + at, mask=at < size, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / largest
    tl.store(scale + row, s)
    tl.store(out + row * size + at, (value / s).to(out.dtype.element_ty), mask=at < size)
