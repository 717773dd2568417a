"""The chunk formulas against the definition: which keys does each query see, through the block table, at every border."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4core.attention.chunked import ring_width, single_chunk_metadata, tree_chunk_metadata, virtual_batches
from l4core.plugin_api import AttentionMetadata, TreeMask

PAGES = [1, 16, 32, 64]
CHUNK = 64
Sequences = list[tuple[int, int]]  # (tokens before the first query, queries)


def page_of(b: int, index: int) -> int:
    """Any number that names sequence and page index."""
    return 1 + b * 1000 + index


def metadata(sequences: Sequences, **changes: object) -> AttentionMetadata:
    counts = [n for _, n in sequences]
    fields = {
        "cu_seqlens_q": torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        "seq_lens": torch.tensor([prefix + n for prefix, n in sequences], dtype=torch.int32),
        "block_table": torch.zeros(len(sequences), 1, dtype=torch.int32),
        "max_seqlen_q": max(counts),
        "max_seqlen_k": max(1, *(prefix + n for prefix, n in sequences)),
        "num_seqs": len(sequences),
        "phase": "decode" if max(counts) == 1 else "prefill",
    }
    return AttentionMetadata(**(fields | changes))


def full_table(sequences: Sequences, page: int) -> torch.Tensor:
    width = max(1, *(-(-(prefix + n) // page) for prefix, n in sequences))
    return torch.tensor([[page_of(b, i) for i in range(width)] for b in range(len(sequences))], dtype=torch.int32)


def ring_table(sequences: Sequences, page: int, chunk: int = CHUNK) -> torch.Tensor:
    """What core keeps: pages of the chunks that the queries touch, everything else the null page."""
    table = torch.zeros(len(sequences), ring_width(chunk, page), dtype=torch.int32)
    for b, (prefix, n) in enumerate(sequences):
        for index in range(prefix // chunk * chunk // page, -(-(prefix + n) // page)):
            table[b, index % table.shape[1]] = page_of(b, index)
    return table


def seen(meta: AttentionMetadata, page: int) -> list[list[tuple[int, int]]]:
    """For each query row the (page, offset) of every key it sees, from the metadata's own contract."""
    rows: list[list[tuple[int, int]]] = []
    cu, lens = meta.cu_seqlens_q.tolist(), meta.seq_lens.tolist()
    assert len(cu) == meta.num_seqs + 1 == len(lens) + 1 == meta.block_table.shape[0] + 1
    for b in range(meta.num_seqs):
        n = cu[b + 1] - cu[b]
        assert 0 <= n <= meta.max_seqlen_q
        assert n <= lens[b] <= meta.max_seqlen_k
        for i in range(n):
            keys = range(lens[b] - n + i + 1)
            rows.append([(int(meta.block_table[b, j // page]), j % page) for j in keys])
    return rows


def expected(sequences: Sequences, page: int, chunk: int = CHUNK) -> list[list[tuple[int, int]]]:
    return [
        [(page_of(b, key // page), key % page) for key in range(p // chunk * chunk, p + 1)]
        for b, (prefix, n) in enumerate(sequences)
        for p in range(prefix, prefix + n)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_decode_at_every_position_around_borders(page: int) -> None:
    sequences = [(prefix, 1) for prefix in (0, 1, 15, 16, 62, 63, 64, 65, 126, 127, 128, 129, 191, 192, 640, 703)]
    meta = metadata(sequences)
    local = single_chunk_metadata(meta, ring_table(sequences, page), CHUNK, page)
    assert seen(local, page) == expected(sequences, page)
    assert local.cu_seqlens_q is meta.cu_seqlens_q
    assert local.phase == "decode"
    assert local.block_table.dtype == local.seq_lens.dtype == torch.int32
    assert local.block_table.shape[1] <= CHUNK // page


@pytest.mark.parametrize("page", PAGES)
def test_prefill_pieces_inside_one_chunk(page: int) -> None:
    sequences = [(0, 64), (0, 1), (0, 63), (64, 64), (65, 63), (127, 1), (128, 5), (140, 7), (63, 1)]
    local = single_chunk_metadata(metadata(sequences), ring_table(sequences, page), CHUNK, page)
    assert seen(local, page) == expected(sequences, page)


def test_empty_rows_stay_empty() -> None:
    """Padding of a graph's batch: seq_len 0."""
    sequences = [(70, 1), (0, 0), (0, 0)]
    meta = metadata(sequences)
    ring = ring_table(sequences, 16)
    local = single_chunk_metadata(meta, ring, CHUNK, 16)
    assert local.seq_lens.tolist() == [7, 0, 0]
    virtual = virtual_batches(meta, ring, CHUNK, 16, 1)
    assert virtual.seq_lens.tolist() == [7, 0, 0]


def test_short_batches_get_narrow_tables() -> None:
    sequences = [(10, 1), (20, 1)]
    local = single_chunk_metadata(metadata(sequences), ring_table(sequences, 16), CHUNK, 16)
    assert local.block_table.shape == (2, 2)
    assert local.max_seqlen_k == 21


def test_a_full_table_serves_as_well_as_a_ring() -> None:
    sequences = [(200, 1), (130, 1), (5, 1)]
    meta = metadata(sequences)
    ring = single_chunk_metadata(meta, ring_table(sequences, 16), CHUNK, 16)
    full = single_chunk_metadata(meta, full_table(sequences, 16), CHUNK, 16)
    assert seen(ring, 16) == seen(full, 16) == expected(sequences, 16)


@pytest.mark.parametrize("page", PAGES)
def test_virtual_batches_over_borders(page: int) -> None:
    sequences = [(62, 4), (60, 4), (61, 3), (63, 2), (64, 3), (0, 65), (1, 64), (127, 65), (100, 1), (0, 0)]
    meta = metadata(sequences)
    for table in (ring_table(sequences, page), full_table(sequences, page)):
        split = virtual_batches(meta, table, CHUNK, page, 2)
        assert split.num_seqs == 2 * len(sequences)
        assert seen(split, page) == expected(sequences, page)


def test_virtual_batches_of_a_prefix_and_more_than_two_chunks() -> None:
    """A cached prefix is nothing special; a piece over four borders needs the full table."""
    sequences = [(50, 250), (0, 257), (191, 2)]
    split = virtual_batches(metadata(sequences), full_table(sequences, 16), CHUNK, 16, 6)
    assert seen(split, 16) == expected(sequences, 16)


@given(
    page_and_chunk=st.sampled_from([(1, 1), (1, 3), (1, 8), (2, 8), (4, 8), (8, 8), (16, 64), (64, 64)]),
    sequences=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9)), min_size=1, max_size=5),
    extra=st.integers(0, 2),
)
def test_virtual_batches_are_the_definition(page_and_chunk: tuple[int, int], sequences: Sequences, extra: int) -> None:
    page, chunk = page_and_chunk
    meta = metadata(sequences)
    num_virtual = -(-(meta.max_seqlen_q - 1) // chunk) + 1 + extra
    split = virtual_batches(meta, full_table(sequences, page), chunk, page, num_virtual)
    assert seen(split, page) == expected(sequences, page, chunk)
    if meta.max_seqlen_q <= chunk + 1:  # touches two chunks at most: the ring has both
        split = virtual_batches(meta, ring_table(sequences, page, chunk), chunk, page, num_virtual)
        assert seen(split, page) == expected(sequences, page, chunk)


@given(
    page=st.sampled_from(PAGES),
    sequences=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 64)), min_size=1, max_size=5),
)
def test_single_chunk_is_the_definition(page: int, sequences: Sequences) -> None:
    cut = [(prefix, min(n, CHUNK - prefix % CHUNK)) for prefix, n in sequences]
    local = single_chunk_metadata(metadata(cut), ring_table(cut, page), CHUNK, page)
    assert seen(local, page) == expected(cut, page)


def test_ten_million_tokens_fit_in_int32() -> None:
    prefix, chunk, page = 10_485_760 - 1, 8192, 64
    meta = metadata([(prefix, 1)])
    ring = torch.arange(ring_width(chunk, page), dtype=torch.int32)[None]
    local = single_chunk_metadata(meta, ring, chunk, page)
    assert local.seq_lens.tolist() == [8192]
    first = prefix // chunk * (chunk // page) % ring.shape[1]
    assert local.block_table[0].tolist() == list(range(first, first + 128))


def test_too_few_virtual_batches_are_refused() -> None:
    sequences = [(0, CHUNK + 2)]
    with pytest.raises(ValueError, match="2 virtual batches given; 66 queries may touch 3 chunks of 64"):
        virtual_batches(metadata(sequences), full_table(sequences, 16), CHUNK, 16, 2)


def test_a_page_that_does_not_divide_the_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="page size 48 does not divide the chunk of 64"):
        ring_width(64, 48)


def test_a_tree_is_refused() -> None:
    meta = metadata([(3, 2)], tree=TreeMask(ancestors=torch.ones(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="by position"):
        single_chunk_metadata(meta, full_table([(3, 2)], 16), CHUNK, 16)
    with pytest.raises(ValueError, match="by position"):
        virtual_batches(meta, full_table([(3, 2)], 16), CHUNK, 16, 2)


def test_nothing_is_read_on_the_host() -> None:
    """On the meta device a read raises."""
    sequences = [(62, 4), (3, 1)]
    meta, ring = metadata(sequences), ring_table(sequences, 16).to("meta")
    meta = metadata(sequences, cu_seqlens_q=meta.cu_seqlens_q.to("meta"), seq_lens=meta.seq_lens.to("meta"))
    assert single_chunk_metadata(meta, ring, CHUNK, 16).block_table.shape == (2, 4)
    assert virtual_batches(meta, ring, CHUNK, 16, 2).block_table.shape == (4, 4)


# ---------------------------------------------------------------- trees

Parents = list[int]  # of node i, a smaller index; −1 = hangs on the prefix


def tree_metadata(prefixes: list[int], trees: list[Parents]) -> tuple[AttentionMetadata, torch.Tensor]:
    """Nodes in order of depth → metadata of a verify step and every node's position."""
    ancestors, positions = [], []
    for prefix, parents in zip(prefixes, trees, strict=True):
        bits: list[int] = []
        depths: list[int] = []
        for i, parent in enumerate(parents):
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        ancestors += bits
        positions += [prefix + depth for depth in depths]
    sequences = [(prefix, len(parents)) for prefix, parents in zip(prefixes, trees, strict=True)]
    mask = TreeMask(ancestors=torch.tensor(ancestors))
    return metadata(sequences, tree=mask, phase="verify"), torch.tensor(positions)


def seen_in_tree(meta: AttentionMetadata, page: int) -> list[list[tuple[int, int]]]:
    """As `seen`, for a batch with a tree."""
    rows = []
    cu, lens = meta.cu_seqlens_q.tolist(), meta.seq_lens.tolist()
    assert meta.tree is not None
    for b in range(meta.num_seqs):
        n = cu[b + 1] - cu[b]
        prefix = lens[b] - n
        assert lens[b] <= meta.max_seqlen_k
        for row in range(cu[b], cu[b + 1]):
            sees_prefix = meta.tree.sees_prefix is None or bool(meta.tree.sees_prefix[row])
            keys = list(range(prefix)) if sees_prefix else []
            keys += [prefix + j for j in range(n) if int(meta.tree.ancestors[row]) >> j & 1]
            rows.append([(int(meta.block_table[b, j // page]), j % page) for j in keys])
    return rows


def expected_in_tree(
    prefixes: list[int], trees: list[Parents], positions: torch.Tensor, page: int
) -> list[list[tuple[int, int]]]:
    """The definition: ancestors and prefix tokens of the node's own chunk, the node at `position` standing in slot prefix + i."""
    rows, first = [], 0
    for b, (prefix, parents) in enumerate(zip(prefixes, trees, strict=True)):
        at = positions[first : first + len(parents)].tolist()
        first += len(parents)
        for i in range(len(parents)):
            begin = at[i] // CHUNK * CHUNK
            path, node = [], i
            while node >= 0:
                path.append(node)
                node = parents[node]
            keys = [*range(begin, prefix), *(prefix + j for j in sorted(path) if at[j] >= begin)]
            rows.append([(page_of(b, key // page), key % page) for key in keys])
    return rows


def parents_of(num: int, choose: st.DataObject | None = None) -> Parents:
    """Node 0 hangs on the prefix; each later node hangs on any earlier one, then they are put in order of depth."""
    if choose is None:
        return [-1, 0, 0, 1, 1, 2, 3, 5][:num]
    drawn = [-1] + [choose.draw(st.integers(-1, i - 1)) for i in range(1, num)]
    depths: list[int] = []
    for parent in drawn:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    order = sorted(range(num), key=lambda i: depths[i])
    place = {old: new for new, old in enumerate(order)}
    return [place[drawn[old]] if drawn[old] >= 0 else -1 for old in order]


@pytest.mark.parametrize("page", PAGES)
def test_tree_nodes_belong_to_chunks_by_position(page: int) -> None:
    prefixes = [10, 61, 62, 63, 64, 126, 127, 190, 0]
    trees = [parents_of(8)] * len(prefixes)
    meta, positions = tree_metadata(prefixes, trees)
    sequences = [(prefix, 8) for prefix in prefixes]
    for table in (ring_table(sequences, page), full_table(sequences, page)):
        local = tree_chunk_metadata(meta, table, positions, CHUNK, page)
        assert seen_in_tree(local, page) == expected_in_tree(prefixes, trees, positions, page)


@given(
    data=st.data(),
    page=st.sampled_from([1, 8, 32, 64]),
    shapes=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_any_tree_sees_what_the_definition_says(data: st.DataObject, page: int, shapes: list[tuple[int, int]]) -> None:
    prefixes = [prefix for prefix, _ in shapes]
    trees = [parents_of(num, data) for _, num in shapes]
    meta, positions = tree_metadata(prefixes, trees)
    local = tree_chunk_metadata(meta, ring_table(shapes, page), positions, CHUNK, page)
    assert seen_in_tree(local, page) == expected_in_tree(prefixes, trees, positions, page)


def test_the_tree_function_wants_a_tree() -> None:
    meta = metadata([(3, 2)])
    with pytest.raises(ValueError, match="TreeMask"):
        tree_chunk_metadata(meta, full_table([(3, 2)], 16), torch.tensor([3, 4]), CHUNK, 16)
