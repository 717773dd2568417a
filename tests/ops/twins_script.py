"""Compares the Triton kernels of l4core.ops with their torch twins on `sys.argv[1]` ("cpu" under Triton's interpreter, or "cuda")."""

from __future__ import annotations

import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4core.ops.heads import HeadRule, TorchHeads
from l4core.ops.heads_triton import TritonHeads
from l4core.ops.linear import linear
from l4core.ops.norm import add_rms_norm_torch, pair_norm_torch
from l4core.ops.norm_route_triton import norm_route_triton
from l4core.ops.norm_triton import add_rms_norm_triton
from l4core.ops.pair_norm_triton import pair_norm_triton
from l4core.ops.silu_mul import silu_mul_torch
from l4core.ops.silu_mul_triton import silu_mul_triton
from l4core.ops.skinny_triton import SkinnyTile, skinny_linear, tile_for
from l4core.plugin_api import KVView

DEVICE = sys.argv[1]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6 if DEVICE == "cpu" else 2**-7, torch.float16: 2**-9}
"""The interpreter cuts bfloat16 off where a device rounds it."""
few = settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**31)


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def near(ours: torch.Tensor, twin: torch.Tensor, slack: float = 1) -> None:
    assert ours.dtype == twin.dtype
    tolerance = TOLERANCE[twin.dtype] * slack
    torch.testing.assert_close(ours.float(), twin.float(), rtol=tolerance, atol=tolerance)


@few
@given(
    tokens=st.integers(0, 5),
    size=st.integers(1, 300),
    dtype=dtypes,
    seed=seeds,
    layout=st.sampled_from("ats"),
    keeps=st.booleans(),
)
def add_norm(tokens: int, size: int, dtype: torch.dtype, seed: int, layout: str, keeps: bool) -> None:
    """layout: the update is absent, a transposed view, or a slice of wider rows.  keeps: the sum is wanted apart, too."""
    stream = randn(tokens, size + 8, seed=seed, dtype=dtype)[:, :size]
    update = {
        "a": None,
        "t": randn(size, tokens, seed=seed + 1, dtype=dtype).t(),
        "s": randn(tokens, size + 3, seed=seed + 1, dtype=dtype)[:, :size],
    }[layout]
    weight = randn(size, seed=seed + 2, dtype=dtype)
    twin_stream = stream.clone()
    twin = add_rms_norm_torch(twin_stream, update, weight, 1e-5)
    beside = torch.zeros(tokens, 3, size, dtype=dtype, device=stream.device)
    ours = add_rms_norm_triton(stream, update, weight, 1e-5, beside[:, 1] if keeps else None)
    assert torch.equal(beside[:, 1], stream if keeps else torch.zeros_like(stream))
    assert not beside[:, ::2].any()
    near(stream, twin_stream)
    assert DEVICE == "cpu" or torch.equal(stream, twin_stream)
    near(ours, twin)


@few
@given(
    tokens=st.integers(1, 5),
    size=st.sampled_from([48, 1024, 1500]),
    experts=st.sampled_from([1, 5, 16]),
    dtype=dtypes,
    seed=seeds,
    transposed=st.booleans(),
)
def norm_route(tokens: int, size: int, experts: int, dtype: torch.dtype, seed: int, transposed: bool) -> None:
    """The norm as alone, the router of exactly what it gave; both of a token the same whatever its neighbours."""
    stream = randn(tokens, size + 8, seed=seed, dtype=dtype)[:, :size]
    update = (
        randn(size, tokens, seed=seed + 1, dtype=dtype).t()
        if transposed
        else randn(tokens, size, seed=seed, dtype=dtype)
    )
    weight, router = randn(size, seed=seed + 2, dtype=dtype), randn(experts, size, seed=seed + 3, dtype=dtype)
    twin_stream, alone = stream.clone(), stream[-1:].clone()
    ours, ids, score = norm_route_triton(stream, update, weight, 1e-5, router)
    near(ours, add_rms_norm_torch(twin_stream, update, weight, 1e-5))
    near(stream, twin_stream)
    logits = ours.double() @ router.double().t()
    chosen = logits.gather(1, ids.long().unsqueeze(1)).squeeze(1)
    assert (logits.amax(1) - chosen).max() <= 1e-5 * size**0.5  # a tie within rounding may go either way
    torch.testing.assert_close(score.double(), chosen.sigmoid(), atol=1e-4, rtol=1e-4)
    for found, whole in zip(
        norm_route_triton(alone, update[-1:], weight, 1e-5, router), (ours, ids, score), strict=True
    ):
        assert torch.equal(found, whole[-1:])


@few
@given(tokens=st.integers(0, 5), size=st.integers(1, 300), dtype=dtypes, seed=seeds)
def two_norms(tokens: int, size: int, dtype: torch.dtype, seed: int) -> None:
    """Rows that lie apart."""
    a, b = (randn(tokens, size + more, seed=seed + more, dtype=dtype)[:, :size] for more in (3, 8))
    weights = [randn(size, seed=seed + i, dtype=dtype) for i in (1, 2)]
    near(pair_norm_triton(a, b, *weights, 1e-5), pair_norm_torch(a, b, *weights, 1e-5))


@few
@given(tokens=st.integers(0, 4), size=st.integers(1, 1500), dtype=dtypes, seed=seeds, transposed=st.booleans())
def silu(tokens: int, size: int, dtype: torch.dtype, seed: int, transposed: bool) -> None:
    gate_up = randn(tokens, 2 * size, seed=seed, dtype=dtype)
    if transposed:
        gate_up = gate_up.t().contiguous().t()
    near(silu_mul_triton(gate_up), silu_mul_torch(gate_up))


@few
@given(
    tokens=st.sampled_from([1, 2, 3, 5, 70]),
    heads=st.sampled_from([(4, 2), (5, 1), (3, 3), (8, 4)]),
    head_dim=st.sampled_from([6, 16, 32]),
    page_size=st.sampled_from([1, 4, 16]),
    kind=st.sampled_from(["chunked", "full", "global", "global without temperature"]),
    qk_norm=st.booleans(),
    kv_dtype=st.sampled_from([None, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]),
    scaled=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def heads(tokens, heads, head_dim, page_size, kind, qk_norm, kv_dtype, scaled, dtype, seed) -> None:
    num_q, num_kv = heads
    chunk, floor_scale, attn_scale = 24, 8, 0.1
    draw = torch.Generator().manual_seed(seed)
    num_pages = tokens // page_size + 3
    rule = HeadRule(
        num_q_heads=num_q,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        rope=kind in ("chunked", "full"),
        chunked=kind == "chunked",
        qk_norm_eps=1e-5 if qk_norm else None,
    )
    qkv = randn(tokens, (num_q + 2 * num_kv) * head_dim + 4, seed=seed, dtype=dtype)[:, :-4]
    positions = torch.randint(0, 100, (tokens,), generator=draw).to(DEVICE)
    slots = torch.randperm(num_pages * page_size, generator=draw)[:tokens].to(DEVICE)
    angles = torch.rand(100, head_dim // 2, generator=draw) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    tables = {True: table[:chunk], False: table}
    memory = torch.zeros(num_pages, 3, 2, page_size, num_kv, head_dim, dtype=kv_dtype or dtype, device=DEVICE)
    is_fp8 = kv_dtype is not None and kv_dtype.itemsize == 1
    scales = (
        {name: torch.tensor(s, device=DEVICE) for name, s in (("k", 0.3), ("v", 0.02))} if is_fp8 and scaled else {}
    )
    view = KVView(k=memory[:, 1, 0], v=memory[:, 1, 1], k_scale=scales.get("k"), v_scale=scales.get("v"))
    temperature = (torch.log1p(((positions + 1) // floor_scale).float()) * attn_scale + 1).view(-1, 1, 1)
    cools = kind == "global"
    twin_memory = torch.zeros(memory.shape, dtype=torch.float32, device=DEVICE)
    torch_heads = TorchHeads(
        slots={"g": (slots // page_size, slots % page_size)},
        rope={True: tables[True][positions % chunk].unsqueeze(1), False: table[positions].unsqueeze(1)},
        temperature=temperature if cools else None,
    )
    triton_heads = TritonHeads(
        positions=positions,
        slots={"g": slots},
        tables=tables,
        temperature=(floor_scale, attn_scale) if cools else None,
    )
    ours_in, twin_in = qkv.clone(memory_format=torch.preserve_format), qkv.float()
    q_twin = torch_heads(twin_in, rule, "g", twin_memory[:, 1], view)
    q = triton_heads(ours_in, rule, "g", memory[:, 1], view)
    assert q.shape == (tokens, num_q, head_dim)
    near(q, q_twin.to(dtype))
    wanted = twin_memory[:, 1]
    if is_fp8:
        wanted = torch.stack(
            [wanted[:, i] / scales.get(n, torch.ones((), device=DEVICE)) for i, n in enumerate("kv")], 1
        )
        largest = torch.finfo(memory.dtype).max
        wanted = wanted.clamp(-largest, largest).to(memory.dtype)
        ours_bits, twin_bits = (x.view(torch.uint8).int() for x in (memory[:, 1], wanted))
        assert ((ours_bits & 127) - (twin_bits & 127)).abs().max() <= 1  # a sum's last bit may round another way
        assert (ours_bits != twin_bits).float().mean() < 0.02
        assert torch.equal((memory[:, 1].float() != 0), (wanted.float() != 0))
    else:
        narrow = memory.dtype if TOLERANCE[memory.dtype] > TOLERANCE[dtype] else dtype
        near(memory[:, 1].to(narrow), wanted.to(narrow))
    assert memory[:, 0].float().count_nonzero() == 0
    assert memory[:, 2].float().count_nonzero() == 0


@few
@given(
    rows=st.integers(1, 20),
    num_out=st.integers(1, 90),
    steps=st.integers(1, 3),
    dtype=dtypes,
    padded=st.booleans(),
    seed=seeds,
)
def skinny(rows: int, num_out: int, steps: int, dtype: torch.dtype, padded: bool, seed: int) -> None:
    """padded: rows of x, weight and result lie apart. A single row need not divide into steps."""
    depth, pad = 64 * steps - 24 * (rows == 1), 16 * padded
    x = randn(rows, depth + pad, seed=seed, dtype=dtype)[:, :depth]
    weight = (randn(num_out, depth + pad, seed=seed + 1, dtype=dtype) / depth**0.5)[:, :depth]
    out = torch.zeros(rows, num_out + pad, dtype=dtype, device=DEVICE)
    tile = SkinnyTile(rows=1 if rows == 1 else 32, columns=16, depth=64, warps=4, stages=2)
    assert skinny_linear(x, weight, out[:, :num_out], tile).shape == (rows, num_out)
    near(out[:, :num_out], (x.double() @ weight.double().t()).to(dtype), slack=4)
    assert out[:, num_out:].count_nonzero() == 0
    assert tile_for(rows, 640) is not None
    assert tile_for(33, 640) is None
    assert (tile_for(rows, 96) is None) == (rows > 1)
    assert tile_for(1, 644) is None


def large_weights() -> None:
    """On a device the tiles as `linear` chooses them, each row the same whatever its neighbours."""
    if DEVICE == "cpu":
        return
    x, weight = randn(32, 1024, seed=0, dtype=torch.bfloat16), randn(4100, 1024, seed=1, dtype=torch.bfloat16)
    wanted = (x.double() @ weight.double().t()).bfloat16()
    short, small = randn(1, 640, seed=2, dtype=torch.bfloat16), randn(4100, 640, seed=3, dtype=torch.bfloat16)
    near(linear(short, small) / 32, (short.double() @ small.double().t()).bfloat16() / 32)
    for rows in (1, 2, 16, 17, 32):
        found = linear(x[:rows], weight)
        near(found / 32, wanted[:rows] / 32)
        assert rows == 1 or torch.equal(found, linear(x, weight)[:rows])


def fp8_bits() -> None:
    """Every number of both formats, what lies half way between two, what is above the largest, and NaN, bit for bit: through one token's values."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(128, dtype=torch.uint8).view(dtype).float()
        codes, largest = codes[codes.isfinite()], torch.finfo(dtype).max
        middle = (codes[1:] + codes[:-1]) / 2
        edges = torch.tensor([largest, largest * 1.01, 1e9, torch.inf, torch.nan, 2.0**-11, 2.0**-18, 0.0])
        x = torch.cat([codes, middle, middle.nextafter(torch.zeros(())), middle.nextafter(torch.tensor(1e9)), edges])
        x = torch.cat([x, -x]).to(DEVICE)
        x = torch.cat([x, x.new_zeros(-x.numel() % 4)])
        memory = torch.zeros(1, 2, 1, 1, x.numel(), dtype=dtype, device=DEVICE)
        rule = HeadRule(num_q_heads=1, num_kv_heads=1, head_dim=x.numel(), rope=False, chunked=False, qk_norm_eps=None)
        zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        heads = TritonHeads(positions=zero, slots={"g": zero}, tables={}, temperature=None)
        heads(torch.cat([x, x, x]).unsqueeze(0), rule, "g", memory, KVView(k=memory[:, 0], v=memory[:, 1]))
        wanted = x.clamp(-largest, largest).to(dtype).view(torch.uint8)
        for which in (0, 1):
            assert torch.equal(memory.view(torch.uint8)[0, which, 0, 0], wanted)


def main() -> None:
    for check in (add_norm, norm_route, two_norms, silu, heads, skinny, large_weights, fp8_bits):
        check()
        print(check.__name__, end=" ", flush=True)


if __name__ == "__main__":
    main()
