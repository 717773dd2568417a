"""SwiGLU experts on 4-bit weights with one scale for 128 inputs: two Triton kernels, for one row or for thousands.

The product is written W · xᵀ: weight words go from memory to registers, are unpacked there straight into the operand of the tensor core and
never touch shared memory as bfloat16. A group's product is exact in its integers (−8 … 143 are bfloat16 numbers) and meets its scale in float32.
For few rows the weights stay 136 too large, which saves a third of the unpacking; −136 times the sum of a group's inputs, one more product, makes up
for it.

W [N, K] of one expert is kept as (quant.int4):
    packed int16 [⌈K/128⌉, N, 32]    nibble q of word j = W[n, 128·g + 32·q + j] + 8
    scales bfloat16 [⌈K/128⌉, N]
so that a tile of any number of rows of one group is one contiguous stretch of memory, and nibble q of a whole tile is one operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from l4core.ops.expert_rows_triton import ALL, FEW, add_parts, find_rows, is_last, weight_of
from l4core.ops.overlap_triton import let_next_start, wait_for_last

OFFSET = tl.constexpr(136.0)
"""What unpacked weights are too large by, where it is not taken off each: 128 of the bits they are put into, 8 of the packing."""

HELD = tl.constexpr(16)
"""Groups whose scales a program may hold in registers."""


@triton.jit
def unpack(words, q: tl.constexpr, RAW: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr):
    """Nibble q of int16 words, minus 8; RAW: plus 128. 0x4300 | v is the bfloat16 128 + v: two instructions for two weights, or three."""
    if not ASM:
        return (((words.to(tl.int32) >> (4 * q)) & 15) - 8).to(DOT)
    elif RAW:
        if q == 0:
            return tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea;", "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
            )  # fmt: skip
        elif q == 1:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.b32 t, $1, 4; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif q == 2:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.b32 t, $1, 12; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif q == 0:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, one, off; mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308;"
            " lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, off;}",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif q == 1:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, one, off; mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308; shr.b32 t, $1, 4;"
            " lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, off;}",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif q == 2:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, one, off; mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308; shr.b32 t, $1, 8;"
            " lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, off;}",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, one, off; mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308; shr.b32 t, $1, 12;"
            " lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, off;}",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def tile_offsets(rows, x_stride, BLOCK_N: tl.constexpr):
    """→ (of the words of BLOCK_N outputs of one group, of 32 inputs of these rows of x). 64 bits from the beginning, so that what a thread's
    addresses have in common is computed once."""
    j = tl.arange(0, 32).to(tl.int64)
    return tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * 32 + j[None, :], rows.to(tl.int64)[:, None] * x_stride + j[
        None, :
    ]


@triton.jit
def load_inputs(at, inside, k, K, EVEN_K: tl.constexpr):
    """32 inputs of the rows that count, from k on. Nothing is loaded for the others."""
    here = inside[:, None]
    if not EVEN_K:
        here = here & ((k + tl.arange(0, 32))[None, :] < K)
    return tl.load(at, mask=here, other=0.0)


@triton.jit
def end_after_last(pid, PDL: tl.constexpr):
    """Of an idle program: where all are idle, the launch must still not end before the one ahead of it."""
    if PDL:  # noqa: SIM102  (this one is decided when the kernel is compiled)
        if pid == 0:
            wait_for_last()


@triton.jit
def hold_scales(at, stride, count, BLOCK_N: tl.constexpr, ASM: tl.constexpr):
    """Scales of BLOCK_N outputs for up to 16 groups, the left operand of `scale_of`. at: of the first group, [BLOCK_N]."""
    g = tl.arange(0, HELD)
    scales = tl.load(at[:, None] + g[None, :] * stride, mask=(g < count)[None, :], other=0.0)
    return scales if ASM else scales.to(tl.float32)


@triton.jit
def scale_of(held, g, BLOCK_T: tl.constexpr, ASM: tl.constexpr):
    """Group g's scales as [BLOCK_N, BLOCK_T] where a product leaves its sums: a product with a column of zeros and a one, which is exact. Loading a
    scale in each turn of the loop takes it through shared memory, and all warps to two barriers."""
    one = tl.where((tl.arange(0, HELD)[:, None] == g) & (tl.arange(0, BLOCK_T)[None, :] >= 0), 1.0, 0.0)
    return tl.dot(held, one.to(held.dtype), input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def int4_gate_up(  # noqa: C901, PLR0915  (one loop, from memory to result)
    x, packed, scales, shared_packed, shared_scales, ids, order, ends, score, out, sums, counters,
    num_tokens, x_stride, n_blocks, K, inter,
    MODE: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr, EVEN_K: tl.constexpr, RATIO: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
    FEW_GROUPS: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[p] = silu(s·g) · (s·u), [rows, inter]; s = 1 for the shared expert and with ALL. Grid (n_blocks × entries or tiles, PARTS).

    PARTS: programs that share the inputs of one output; each leaves its part in sums float32 [PARTS, rows, 2·inter], the last adds them up.
    RATIO: keep the sums in units of the current scale instead of adding scaled sums: half the registers, for large tiles.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    if PDL and not LATE:
        wait_for_last()
        let_next_start()
    expert, rows, tokens, inside, block, _ = find_rows(
        MODE, pid, ids, order, ends, num_tokens, n_blocks, E, SHARED, BLOCK_E, BLOCK_T
    )
    if expert < 0:
        if LATE:
            end_after_last(pid, PDL)
        return
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = (K + 127) // 128
    per_part = groups // PARTS
    g0 = part * per_part
    half = inter * 32
    wp = weight_of(MODE, packed, shared_packed, expert, groups * 2 * half, E, SHARED)
    wp += (g0 * (2 * inter) + block * BLOCK_N).to(tl.int64) * 32
    sp = weight_of(MODE, scales, shared_scales, expert, groups * 2 * inter, E, SHARED) + g0 * (2 * inter) + n
    xp = x + g0 * 128
    in_w, in_x = tile_offsets(tokens, x_stride, BLOCK_N)
    RAW: tl.constexpr = ASM and not RATIO
    gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if FEW_GROUPS:
        gate_scales = hold_scales(sp, 2 * inter, per_part, BLOCK_N, ASM)
        up_scales = hold_scales(sp + inter, 2 * inter, per_part, BLOCK_N, ASM)
    else:
        gate_scale, up_scale = tl.load(sp).to(tl.float32), tl.load(sp + inter).to(tl.float32)
    for g in range(0, per_part):
        wg = tl.load(wp + in_w)
        wu = tl.load(wp + half + in_w)
        if not FEW_GROUPS:
            sp += 2 * inter
            more = (n * 0 + g) < per_part - 1
            next_gate = tl.load(sp, mask=more, other=1.0).to(tl.float32)
            next_up = tl.load(sp + inter, mask=more, other=1.0).to(tl.float32)
        part_gate, part_up = gate, up
        offset = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        if not RATIO:
            part_gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            part_up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for q in tl.static_range(4):
            xq = load_inputs(xp + q * 32 + in_x, inside, (g0 + g) * 128 + q * 32, K, EVEN_K).to(DOT).T
            if RAW:
                offset = tl.dot(tl.full((BLOCK_N, 32), -OFFSET, DOT), xq, offset)
            part_gate = tl.dot(unpack(wg, q, RAW, ASM, DOT), xq, part_gate, input_precision="ieee")
            part_up = tl.dot(unpack(wu, q, RAW, ASM, DOT), xq, part_up, input_precision="ieee")
        if RATIO:
            gate = part_gate * (gate_scale / next_gate)[:, None]
            up = part_up * (up_scale / next_up)[:, None]
        else:
            if RAW:
                part_gate += offset
                part_up += offset
            if FEW_GROUPS:
                gate += part_gate * scale_of(gate_scales, g, BLOCK_T, ASM)
                up += part_up * scale_of(up_scales, g, BLOCK_T, ASM)
            else:
                gate += part_gate * gate_scale[:, None]
                up += part_up * up_scale[:, None]
        if not FEW_GROUPS:
            gate_scale, up_scale = next_gate, next_up
        wp += half * 2
        xp += 128
    if PDL and LATE:
        wait_for_last()
        let_next_start()
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
    if MODE != ALL:
        s = tl.load(score + tokens, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(expert == E, 1.0, s)
        gate *= s[None, :]
        up *= s[None, :]
    done = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + rows.to(tl.int64)[None, :] * inter + n[:, None], done.to(out.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def int4_down(  # noqa: C901, PLR0915  (one loop, from memory to result)
    x, packed, scales, shared_packed, shared_scales, ids, order, ends, out, sums, counters,
    num_tokens, x_stride, n_blocks, K, hidden,
    MODE: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr, EVEN_K: tl.constexpr, RATIO: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr, ADD: tl.constexpr,
    FEW_GROUPS: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, hidden] = the sum over a token's experts of W · x[p].

    FEW: programs leave their parts in sums float32 [PARTS, rows, hidden], and the last one of a block of outputs adds a token's parts and experts up.
    MANY, ALL: a token has one row; ADD: it is added to what `out` holds. ALL with PARTS adds up as FEW does.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    expert, rows, tokens, inside, block, working = find_rows(
        MODE, pid, ids, order, ends, num_tokens, n_blocks, E, SHARED, BLOCK_E, BLOCK_T
    )
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = (K + 127) // 128
    per_part = groups // PARTS
    g0 = part * per_part
    sp = weight_of(MODE, scales, shared_scales, expert, groups * hidden, E, SHARED) + g0 * hidden + n
    wp = weight_of(MODE, packed, shared_packed, expert, groups * hidden * 32, E, SHARED)
    wp += (g0 * hidden + block * BLOCK_N).to(tl.int64) * 32
    if PDL and not LATE:
        wait_for_last()
        let_next_start()
    if expert < 0:
        if LATE:
            end_after_last(pid, PDL)
        return
    xp = x + g0 * 128
    in_w, in_x = tile_offsets(rows, x_stride, BLOCK_N)
    RAW: tl.constexpr = ASM and not RATIO
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if FEW_GROUPS:
        held = hold_scales(sp, hidden, per_part, BLOCK_N, ASM)
    else:
        scale = tl.load(sp).to(tl.float32)
    for g in range(0, per_part):
        w = tl.load(wp + in_w)
        if not FEW_GROUPS:
            sp += hidden
            next_scale = tl.load(sp, mask=(n * 0 + g) < per_part - 1, other=1.0).to(tl.float32)
        one = acc
        offset = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        if not RATIO:
            one = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for q in tl.static_range(4):
            xq = load_inputs(xp + q * 32 + in_x, inside, (g0 + g) * 128 + q * 32, K, EVEN_K).to(DOT).T
            if RAW:
                offset = tl.dot(tl.full((BLOCK_N, 32), -OFFSET, DOT), xq, offset)
            one = tl.dot(unpack(w, q, RAW, ASM, DOT), xq, one, input_precision="ieee")
        if RATIO:
            acc = one * (scale / next_scale)[:, None]
        else:
            if RAW:
                one += offset
            if FEW_GROUPS:
                acc += one * scale_of(held, g, BLOCK_T, ASM)
            else:
                acc += one * scale[:, None]
        if not FEW_GROUPS:
            scale = next_scale
        wp += hidden * 32
        xp += 128
    if PDL and LATE:
        wait_for_last()
        let_next_start()
    kept = inside
    if (MODE == FEW) | (PARTS > 1):
        wanted, counter = PARTS, counters + pid
        if MODE == FEW:
            wanted, counter = PARTS * (working + SHARED), counters + block
        last, acc, kept = add_parts(
            MODE,
            ids,
            sums,
            acc,
            rows,
            tokens,
            inside,
            n,
            part,
            num_tokens,
            hidden,
            counter,
            wanted,
            SHARED,
            PARTS,
            BLOCK_N,
            BLOCK_T,
        )
        if not last:
            return
    to = out + tokens.to(tl.int64)[None, :] * hidden + n[:, None]
    if ADD:
        acc += tl.load(to, mask=kept[None, :], other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=kept[None, :])
