"""What the kit does not ask: every instruction set, sequences that several threads share, and bits that do not depend on the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from l4_cpu.attention import CpuAttention
from l4_cpu.library import load
from l4core.plugin_api import AttentionMetadata, AttentionRequirements, KVView, TreeMask

PAGE = 16
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def backend(instructions: str, heads: tuple[int, int, int], dtype: str = "float32", threads: int = 2) -> CpuAttention:
    req = AttentionRequirements(
        num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2], q_dtype=dtype, kv_dtype=dtype
    )
    return CpuAttention(load(instructions), req, PAGE, threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """q [T, Hq, D].  keys, values: [S, Hkv, D] of each sequence, as they were written into the pages of kv."""

    q: torch.Tensor
    kv: KVView
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    meta: AttentionMetadata

    def expected(self) -> torch.Tensor:
        """float64, a row at a time."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        rows = self.meta.cu_seqlens_q.tolist()
        for seq, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            group = self.q.shape[1] // k.shape[1]
            k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
            for row in range(rows[seq], rows[seq + 1]):
                seen = k.shape[0] - (rows[seq + 1] - row) + 1
                scores = torch.einsum("hd,shd->hs", self.q[row].double(), k[:seen]) * self.q.shape[2] ** -0.5
                out[row] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[:seen])
        return out


def batch(heads: tuple[int, int, int], counts: Sequence[tuple[int, int]], dtype: str = "float32") -> Batch:
    """counts: (query rows, keys) of each sequence. Pages in random order; slots that no sequence owns are NaN."""
    num_q, num_kv, dim = heads
    draw = torch.Generator().manual_seed(len(counts))
    kind = getattr(torch, dtype)
    widths = [-(-keys // PAGE) for _, keys in counts]
    pages = torch.randperm(sum(widths) + 3, generator=draw, dtype=torch.int32)
    memory = torch.full((pages.numel(), 2, PAGE, num_kv, dim), torch.nan, dtype=kind)
    table = torch.zeros(len(counts), max(widths), dtype=torch.int32)
    keys, values, first = [], [], 0
    for seq, ((_, length), width) in enumerate(zip(counts, widths, strict=True)):
        table[seq, :width] = pages[first : first + width]
        first += width
        stored = torch.randn(2, length, num_kv, dim, generator=draw).to(kind)
        for token in range(0, length, PAGE):
            some = stored[:, token : token + PAGE]
            memory[table[seq, token // PAGE], :, : some.shape[1]] = some
        keys.append(stored[0])
        values.append(stored[1])
    rows = torch.tensor([0, *(count for count, _ in counts)]).cumsum(0).int()
    meta = AttentionMetadata(
        cu_seqlens_q=rows,
        seq_lens=torch.tensor([length for _, length in counts], dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(count for count, _ in counts),
        max_seqlen_k=max(length for _, length in counts),
        num_seqs=len(counts),
        phase="prefill",
    )
    q = torch.randn(int(rows[-1]), num_q, dim, generator=draw).to(kind)
    return Batch(q=q, kv=KVView(k=memory[:, 0], v=memory[:, 1]), keys=keys, values=values, meta=meta)


def attend(by: CpuAttention, b: Batch) -> torch.Tensor:
    out = torch.full_like(b.q, torch.nan)
    by.attend(b.q, b.kv, by.plan(b.meta), out)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(8, 2, 64), (5, 1, 128), (3, 3, 16), (9, 3, 80), (20, 1, 48), (2, 2, 256)], ids=str)
def test_equals_the_definition(each: str, heads: tuple[int, int, int], dtype: str) -> None:
    """Decodes, whole prompts, pieces behind a prefix; lengths on both sides of a block of 64."""
    b = batch(heads, [(1, 1), (1, 64), (1, 65), (150, 150), (13, 77), (70, 200), (2, 63)], dtype)
    error = (attend(backend(each, heads, dtype), b).double() - b.expected()).abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("threads", [1, 3])
def test_long_sequences_are_dealt_to_threads_in_parts(built: str, threads: int) -> None:
    """Twice as many keys as a part has and some; beside short ones, which are whole."""
    heads = (4, 1, 16)
    b = batch(heads, [(1, 9000), (3, 40), (2, 4100), (1, 4096)])
    error = (attend(backend(built, heads, threads=threads), b).double() - b.expected()).abs().max()
    assert error < TOLERANCE["float32"]


@pytest.mark.parametrize("length", [40, 130, 5000])
def test_a_decode_gets_the_bits_of_a_batch_and_of_another_number_of_threads(built: str, length: int) -> None:
    heads = (8, 2, 64)
    together = batch(heads, [(1, 300), (1, length), (40, 90)])
    found = attend(backend(built, heads), together)
    meta = together.meta
    alone = dataclasses.replace(
        together,
        q=together.q[1:2],
        meta=dataclasses.replace(
            meta,
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=meta.seq_lens[1:2],
            block_table=meta.block_table[1:2],
            num_seqs=1,
        ),
    )
    assert torch.equal(attend(backend(built, heads), alone)[0], found[1])
    assert torch.equal(attend(backend(built, heads, threads=1), alone)[0], found[1])


def test_a_verified_row_gets_the_bits_of_its_decode(built: str) -> None:
    """Rows of one call, and the same rows one at a time with the keys they see."""
    heads = (6, 2, 32)
    b = batch(heads, [(9, 200)])
    found = attend(backend(built, heads), b)
    for row in range(9):
        meta = dataclasses.replace(
            b.meta,
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([192 + row], dtype=torch.int32),
        )
        alone = dataclasses.replace(b, q=b.q[row : row + 1], meta=meta)
        assert torch.equal(attend(backend(built, heads), alone)[0], found[row])


def test_a_tree_that_is_a_chain_gives_the_bits_of_the_causal_mask(each: str) -> None:
    """Nodes across the border of a block of 64 keys, and more prefix than one."""
    heads = (4, 2, 32)
    for keys in (64 + 10, 40, 33, 300):
        b = batch(heads, [(33, keys)])
        chain = torch.tensor([(1 << (row + 1)) - 1 for row in range(33)])
        tree = dataclasses.replace(b, meta=dataclasses.replace(b.meta, tree=TreeMask(ancestors=chain)))
        assert torch.equal(attend(backend(each, heads), tree), attend(backend(each, heads), b))


def test_a_native_chunk_is_refused(built: str) -> None:
    from l4core.plugin_api import ChunkInfo

    meta = dataclasses.replace(batch((2, 1, 16), [(1, 5)]).meta, chunk=ChunkInfo(size=64))
    with pytest.raises(ValueError, match="chunk"):
        backend(built, (2, 1, 16)).plan(meta)


def test_results_are_rounded_to_the_nearest(each: str) -> None:
    """Queries of zero weigh two keys alike: half the sum of two values, which is exact in float32."""
    heads = (2, 1, 256)
    b = batch(heads, [(1, 2)], "bfloat16")
    zero = dataclasses.replace(b, q=torch.zeros_like(b.q))
    mean = b.values[0].float().mean(0).bfloat16()
    assert not torch.equal(mean.float(), b.values[0].float().mean(0))
    assert torch.equal(attend(backend(each, heads, "bfloat16"), zero)[0], mean.expand(2, -1))
