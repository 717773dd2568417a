"""Compares a draft's draw by kernels with the law over its vocabulary, on `sys.argv[1]` ("cpu" under Triton's interpreter, or "cuda"); prints the
number of rows."""

from __future__ import annotations

import sys

import torch

from l4core.engine.speculation.draft_draw_triton import draw_guesses
from l4core.sampling.noise import gumbel_noise_at

NEAR = 1e-4
"""Scores so close are the rounding's to decide: the kernel divides where torch does, but adds a noise from another logarithm."""


def main(device: str) -> int:
    rows = 0
    random = torch.Generator().manual_seed(0)
    for num, draft_vocab, vocab in ((1, 700, 3000), (7, 5000, 9001), (5, 1024, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            keep = torch.randperm(vocab, generator=random)[:draft_vocab].sort().values
            logits = (torch.randn(num, draft_vocab, generator=random) * 3).to(dtype).to(device)
            seeds = torch.randint(-(2**63), 2**63 - 1, (num,), generator=random).to(device)
            positions = torch.randint(0, 2**40, (num,), generator=random).to(device)
            temperature = torch.tensor([(0.7, 0.0, 1.3)[i % 3] for i in range(num)], device=device)
            offsets = (keep - torch.arange(draft_vocab)).to(device)
            keep = keep.to(device)
            noise = gumbel_noise_at(seeds, positions, keep.expand(num, -1))
            heat = temperature.unsqueeze(1)
            scores = torch.where(heat > 0, logits.float() / heat.clamp(min=1e-6) + noise, logits.float())
            check(draw_guesses(logits, offsets, temperature, seeds, positions), scores, keep)
            greedy = draw_guesses(logits, offsets, None, seeds, positions)
            assert torch.equal(greedy, keep[(logits == logits.amax(1, keepdim=True)).long().argmax(1)])
            rows += 2 * num
    return rows


def check(drawn: torch.Tensor, scores: torch.Tensor, keep: torch.Tensor) -> None:
    place = torch.searchsorted(keep, drawn)
    assert torch.equal(keep[place], drawn)
    missing = scores.amax(1) - scores.gather(1, place.unsqueeze(1))[:, 0]
    assert missing.max() <= NEAR, missing


if __name__ == "__main__":
    print(f"{main(sys.argv[1])} rows")
