"""Compares the kernel of a step's tables with its torch twin on `sys.argv[1]` ("cpu" under the interpreter, or "cuda"); prints how many cases."""

from __future__ import annotations

import random
import sys

import torch

from l4core.attention.step_rows import StepRows
from l4core.attention.step_tables import _by_definition
from l4core.attention.step_tables_triton import BLOCK, launch


def main(device: str) -> int:
    draw, cases = random.Random(0), 0
    for page, chunk in ((1, 7), (16, 64), (64, 8192), (16, None), (64, None)):
        for _ in range(24):
            width = 2 * chunk // page if chunk else draw.choice((3, 40, 700))
            num_seqs, most = draw.randrange(1, 6), 3 * chunk if chunk else width * page
            counts = [draw.randrange(1, min(most, 200)) for _ in range(num_seqs)]
            starts = [draw.randrange(most - n + 1) for n in counts]
            padding = [draw.randrange(min(start, 3) + 1) for start in starts]
            owner = [b for b, n in enumerate(counts) for _ in range(padding[b] + n)]
            positions = [start + i for b, start in enumerate(starts) for i in range(-padding[b], counts[b])]
            ints = {"dtype": torch.int32, "device": device}
            step = StepRows(
                rows=torch.tensor(draw.sample(range(9), num_seqs), **ints),
                starts=torch.tensor(starts, **ints),
                seq_lens=torch.tensor([a + n for a, n in zip(starts, counts, strict=True)], **ints),
                positions=torch.tensor(positions, device=device),
                owner=torch.tensor(owner, **ints),
            )
            table = torch.randint(1, 1000, (9, width), **ints)
            columns = width if chunk or draw.random() < 0.5 else -(-int(step.seq_lens.max()) // page)
            ours, slots = launch(table, step, num_columns=columns, page_size=page, chunk_size=chunk)
            twin, twin_slots = _by_definition(table, step, columns, page, chunk)
            assert torch.equal(slots, twin_slots), (page, chunk, starts, counts)
            for b in range(num_seqs):
                sure = columns if chunk else (-(-int(step.seq_lens[b]) // page) // BLOCK + 1) * BLOCK
                assert torch.equal(ours[b, :sure], twin[b, :sure]), (page, chunk, starts, counts)
            cases += 1
    return cases


if __name__ == "__main__":
    print(main(sys.argv[1]), "cases")
