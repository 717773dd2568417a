"""Cutting a batch into one query row a sequence."""

from __future__ import annotations

import torch

from l4_trtllm_mha.xqa import one_row_each
from l4core.plugin_api import AttentionMetadata


def test_each_row_sees_the_keys_up_to_itself() -> None:
    """Sequences of 5 keys with 2 rows, 9 with none, 3 with 3; two rows at the end belong to nobody and read the null page."""
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        seq_lens=torch.tensor([5, 9, 3], dtype=torch.int32),
        block_table=torch.tensor([[7, 8], [4, 5], [6, 0]], dtype=torch.int32),
        max_seqlen_q=3,
        max_seqlen_k=9,
        num_seqs=3,
        phase="prefill",
    )
    rows = one_row_each(meta, 7)
    assert rows.lengths.tolist() == [4, 5, 1, 2, 3, 1, 1]
    assert rows.table.tolist() == [[7, 8], [7, 8], [6, 0], [6, 0], [6, 0], [0, 0], [0, 0]]
    assert rows.lengths.dtype == rows.table.dtype == torch.int32
