"""Compares the kernels of the draw with the law written out, on `sys.argv[1]` ("cpu" under the interpreter, or "cuda"); prints the number of rows."""

from __future__ import annotations

import math
import random
import sys

import torch

from l4core.plugin_ops import masks
from l4core.sampling.draw import argmax_lowest, draw_by_law
from l4core.sampling.draw_triton import draw_rows
from l4core.sampling.records import DrawKey


def main(device: str) -> int:
    draw, rows = random.Random(0), 0
    sizes = [(60, 1003), (5, 9000)] if device == "cpu" else [(256, 202_048), (1, 202_048), (7, 1003), (128, 130_001)]
    for num, vocab_size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(num)) * 3
            logits = logits.to(dtype).to(device)  # bfloat16: many ties
            temperature = [(0.0, 0.3, 1.0, 5.0, 1e-40)[i % 5] for i in range(num)]
            keys = [
                DrawKey(temperature=t, seed=draw.randrange(-(2**63), 2**64), position=draw.randrange(2**40))
                for t in temperature
            ]
            shares = torch.tensor([masks.share((1.0, 0.9, 0.5, 0.05)[i % 4]) for i in range(num)], device=device)
            floors = torch.tensor([(-math.inf, -math.inf, math.log(0.1))[i % 3] for i in range(num)], device=device)
            drawn = draw_rows(
                logits,
                torch.tensor(temperature, device=device),
                torch.tensor([(k.seed + 2**63) % 2**64 - 2**63 for k in keys], device=device),
                torch.tensor([k.position for k in keys], device=device),
                shares,
                floors,
            )
            tokens, best = drawn[0], _best(drawn)
            wide = logits.float()
            wanted = argmax_lowest(wide)
            sampled = [i for i, t in enumerate(temperature) if t > 0]
            if sampled:
                divisors = torch.tensor([max(temperature[i], 1.2e-38) for i in sampled], device=device)
                kept = masks.keep_top_p(wide[sampled], shares[sampled], divisors)
                kept = masks.keep_min_p(kept, floors[sampled], divisors)
                wanted[sampled] = draw_by_law(kept, [keys[i] for i in sampled])
            assert torch.equal(tokens, wanted), (tokens, wanted)
            assert torch.equal(best, wide.amax(1))
            rows += num
    return rows + _faults(device)


def _best(drawn: torch.Tensor) -> torch.Tensor:
    return drawn[1].int().view(torch.float32)


def _faults(device: str) -> int:
    """What is not finite shows in `best`, and the tokens stay in range."""
    logits = torch.zeros(5, 5000, device=device)
    logits[0, 4321], logits[1], logits[2, 7], logits[3, 9] = math.nan, -math.inf, math.inf, 1.0
    for t in (0.0, 1.0):
        zeros = torch.zeros(5, dtype=torch.int64, device=device)
        half = torch.full((5,), masks.share(0.5), device=device)
        drawn = draw_rows(logits, torch.full((5,), t, device=device), zeros, zeros, half, zeros - math.inf)
        tokens, best = drawn[0], _best(drawn)
        assert best.isfinite().tolist() == [False, False, False, True, True], best
        assert best[3] == 1.0
        assert best[0].isnan()
        assert ((tokens >= 0) & (tokens < 5000)).all(), tokens
    return 10


if __name__ == "__main__":
    print(main(sys.argv[1]), "rows")
