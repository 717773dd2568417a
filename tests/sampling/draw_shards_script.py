"""Compares the kernels of a draw over ranks with their torch twins, and both with the law on whole rows, on `sys.argv[1]` ("cpu" under the
interpreter, or "cuda"); prints the number of rows."""

from __future__ import annotations

import random
import sys

import torch

from l4core.sampling import draw_shards_triton as kernels
from l4core.sampling.draw import draw
from l4core.sampling.draw_shards import best_of_share, choose
from l4core.sampling.records import DrawKey


def main(device: str) -> int:
    dice, rows = random.Random(0), 0
    cpu = [(2, 20, 1003), (4, 5, 9002)]  # a share of 501 begins inside a run of the generator
    gpu = [(2, 128, 202_048), (8, 256, 202_048), (16, 1, 202_048), (4, 7, 9002)]
    for num_ranks, num, vocab_size in cpu if device == "cpu" else gpu:
        size = vocab_size // num_ranks
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(num, size * num_ranks, generator=torch.Generator().manual_seed(num)) * 3
            logits = logits.to(dtype).to(device)  # bfloat16: many ties
            keys = [
                DrawKey(
                    temperature=(0.0, 0.3, 1.0, 5.0, 1e-40)[i % 5],
                    seed=dice.randrange(-(2**63), 2**63),
                    position=dice.randrange(2**40),
                )
                for i in range(num)
            ]
            temperature = torch.tensor([k.temperature for k in keys], device=device)
            seeds = torch.tensor([k.seed for k in keys], device=device)
            positions = torch.tensor([k.position for k in keys], device=device)
            found = []
            for rank in range(num_ranks):
                mine = logits[:, rank * size : (rank + 1) * size].contiguous()
                own = kernels.best_of_share(mine, temperature, seeds, positions, rank * size)
                twin = best_of_share(mine.float(), temperature, seeds, positions, rank * size)
                assert torch.equal(own[::2], twin[::2])
                torch.testing.assert_close(own[1].view(torch.float32), twin[1].view(torch.float32), rtol=0, atol=1e-5)
                found.append(own)
            shares = torch.stack(found)
            drawn = kernels.choose(shares, temperature)
            assert torch.equal(drawn, choose(shares, temperature))
            assert torch.equal(drawn[0], draw(logits.float(), keys))
            assert torch.equal(drawn[1].int().view(torch.float32), logits.float().amax(1))
            rows += num
    return rows + _faults(device)


def _faults(device: str) -> int:
    """What is not finite shows in the best logit, wherever it lies, and the tokens stay in range; a share without a finite logit loses."""
    logits = torch.zeros(5, 6000, device=device)
    logits[0, 4321], logits[1], logits[2, 7], logits[3, :3000] = torch.nan, -torch.inf, torch.inf, -torch.inf
    logits[3, 3009] = 1.0
    zeros = torch.zeros(5, dtype=torch.int64, device=device)
    for t in (0.0, 1.0):
        temperature = torch.full((5,), t, device=device)
        halves = [logits[:, 3000 * i : 3000 * (i + 1)].contiguous() for i in range(2)]
        own = [kernels.best_of_share(x, temperature, zeros, zeros, 3000 * i) for i, x in enumerate(halves)]
        for drawn in (kernels.choose(torch.stack(own), temperature), choose(torch.stack(own), temperature)):
            best = drawn[1].int().view(torch.float32)
            assert best.isfinite().tolist() == [False, False, False, True, True], best
            assert best[0].isnan()
            assert best[3] == 1.0
            assert drawn[0][3] >= 3000
            assert ((drawn[0] >= 0) & (drawn[0] < 6000)).all(), drawn
    return 10


if __name__ == "__main__":
    print(main(sys.argv[1]), "rows")
