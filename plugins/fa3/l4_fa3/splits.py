"""Into how many parts the keys of a sequence may be split, so that few query rows still fill the device."""

from __future__ import annotations

from l4_fa3.probe import BLOCK_ROWS, PARTIAL_BYTES


def num_splits(
    *, num_seqs: int, max_seqlen_q: int, num_q_heads: int, num_kv_heads: int, head_dim: int, multiprocessors: int
) -> int:
    """The most splits a sequence may get, from host bounds alone: the same at capture and at every replay. The kernel's schedule lowers it for each
    sequence to what that one's length is worth beside the others.

    A tile is up to BLOCK_ROWS query rows, packed over the heads of a group, of one KV head; a sequence alone should be able to fill the device, for
    the others may be short: with the multiprocessors shared out over the batch, one long sequence among 31 short ones took seven times as long.
    Partial results (float32, one a split) stay within PARTIAL_BYTES.
    """
    group = num_q_heads // num_kv_heads
    tiles = -(-max_seqlen_q * group // BLOCK_ROWS) * num_kv_heads
    split_bytes = num_seqs * max_seqlen_q * num_q_heads * (head_dim + 1) * 4
    return max(1, min(multiprocessors // tiles, PARTIAL_BYTES // split_bytes, MOST))


MOST = 64
"""The library takes up to 256; more than this many parts cost more to combine than they save."""
