"""Compares the chunk kernel with its torch twin on `sys.argv[1]` ("cpu" under the interpreter, or "cuda") and prints the number of cases."""

from __future__ import annotations

import random
import sys

import torch

from l4core.attention.chunked import _fused, _split
from l4core.plugin_api import AttentionMetadata


def metadata(sequences: list[tuple[int, int]], device: str) -> AttentionMetadata:
    """sequences: (tokens before the first query, queries); (−1, 1) is an empty row."""
    counts = [n for _, n in sequences]
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *counts], device=device).cumsum(0).int(),
        seq_lens=torch.tensor([prefix + n for prefix, n in sequences], dtype=torch.int32, device=device),
        block_table=torch.zeros(len(counts), 1, dtype=torch.int32, device=device),
        max_seqlen_q=max(counts),
        max_seqlen_k=max(1, *(prefix + n for prefix, n in sequences)),
        num_seqs=len(counts),
        phase="verify",
    )


def main(device: str) -> int:
    draw, cases = random.Random(0), 0
    for page, chunk in ((1, 1), (1, 7), (16, 64), (64, 64), (64, 8192)):
        for _ in range(32):
            reach = draw.choice((3, 3 * chunk + 9))
            sequences = [(draw.randrange(-1, reach), 1) for _ in range(draw.randrange(1, 6))]
            if draw.random() < 0.6:
                sequences = [(draw.randrange(reach), draw.randrange(0, 9)) for _ in sequences] + [(5, 1)]
            meta = metadata(sequences, device)
            width = draw.choice((2 * chunk // page, 3 * chunk // page + 12, 300))
            table = torch.randint(0, 10_000, (len(sequences), width + 5), dtype=torch.int32, device=device)[:, :width]
            num_virtual = -(-(meta.max_seqlen_q - 1) // chunk) + 1
            arguments = (meta, table, chunk, page, num_virtual, min(meta.max_seqlen_k, chunk))
            for ours, twin in zip(_fused(*arguments), _split(*arguments), strict=True):
                assert ours.dtype == twin.dtype == torch.int32
                assert torch.equal(ours, twin), (sequences, page, chunk)
            cases += 1
    return cases


if __name__ == "__main__":
    print(main(sys.argv[1]), "cases")
