"""On an accelerator: the same tokens as on the CPU, a row alone as in a batch, errors and log-probabilities alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l4core.plugin_ops.philox import key_words, philox_4x32, seed_tensor
from l4core.sampling.logprobs import prompt_logprobs
from l4core.sampling.noise import gumbel_noise
from l4core.sampling.pipeline import DrawRow, SamplingPipeline

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


class HostReads(TorchDispatchMode):
    """Lists what makes the host wait: copies to the CPU, and reads of a value or of a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        copied = name in ("_to_copy", "copy_") and args[0].device.type != "cpu" and out.device.type == "cpu"
        if copied or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"):
            self.found.append(name)
        return out


def mixed(made: SamplingPipeline, draw_row: Callable[..., DrawRow], num: int) -> list[DrawRow]:
    return [
        draw_row(
            made,
            prompt=[1, 2, 3],
            output=list(range(i % 9)),
            position=2**32 + i,
            forbidden=[0, 5] if i % 5 == 0 else [],
            seed=i - 9,
            temperature=[0.0, 0.4, 1.0, 2.0][i % 4],
            top_p=[1.0, 0.9, 0.5][i % 3],
            top_k=[0, 0, 7, 500][i % 4],
            min_p=[0.0, 0.02][i % 2],
            repetition_penalty=[1.0, 1.0, 1.2, 1.0, 0.9][i % 5],
            frequency_penalty=[0.0, 0.5][i % 2],
            logit_bias=[{}, {7: 3.0}][i % 2],
            logprobs=[None, 0, 3, 20][i % 4],
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("vocab_size", [1003, 202_048])
def test_tokens_are_those_of_the_cpu(
    pipeline: Callable[..., SamplingPipeline], draw_row: Callable[..., DrawRow], device: torch.device, vocab_size: int
) -> None:
    made = pipeline(vocab_size)
    rows = mixed(made, draw_row, 96)
    logits = (
        torch.randn(96, vocab_size, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 6, 96)[:, None]
    )
    logits[7, 3], logits[8] = torch.nan, -torch.inf
    here, there = made.sample(logits, rows), made.sample(logits.to(device), rows)
    assert [d.token_id for d in here] == [d.token_id for d in there]
    assert [d.error for d in here] == [d.error for d in there]
    assert [bool(d.error) for d in here] == [i in (7, 8) for i in range(96)]
    for a, b in zip(here, there, strict=True):
        assert (a.logprobs is None) == (b.logprobs is None)
        if a.logprobs is not None and b.logprobs is not None:
            assert (a.logprobs.rank, [t for t, _ in a.logprobs.top]) == (
                b.logprobs.rank,
                [t for t, _ in b.logprobs.top],
            )
            assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=5e-6, rel=5e-7)
    on_device = logits.to(device)
    assert there == [made.sample(on_device[i : i + 1], rows[i : i + 1])[0] for i in range(96)]


def test_a_draw_is_queued_without_waiting(
    pipeline: Callable[..., SamplingPipeline], draw_row: Callable[..., DrawRow], device: torch.device
) -> None:
    made = pipeline(1003)
    logits = torch.randn(96, 1003, generator=torch.Generator().manual_seed(0)).to(device)
    rows = mixed(made, draw_row, 96)
    with HostReads() as reads:
        drawing = made.start(logits, rows)
    assert reads.found == []
    assert len(drawing.finish()) == 96
    with reads:
        bool(logits[0, 0] > 0)
    assert len(reads.found) == 1


def test_words_are_equal_and_noise_nearly(device: torch.device) -> None:
    seeds, positions = seed_tensor([0, -1, 2**63, 12345], "cpu"), torch.tensor([0, 2**40, 5, 2**32 - 1])
    counter = (
        torch.arange(999)[None],
        positions[:, None] & 0xFFFFFFFF,
        positions[:, None] >> 32,
        torch.zeros(4, 1, dtype=torch.int64),
    )
    key = key_words(seeds[:, None])
    here = philox_4x32(counter, key)
    c0, c1, c2, c3 = (c.to(device) for c in counter)
    there = philox_4x32((c0, c1, c2, c3), (key[0].to(device), key[1].to(device)))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    noise = gumbel_noise(seeds, positions, 202_048, device).cpu()
    torch.testing.assert_close(noise, gumbel_noise(seeds, positions, 202_048, "cpu"), rtol=1e-6, atol=1e-6)


def test_prompt_logprobs(device: torch.device) -> None:
    logits = torch.randn(300, 202_048, generator=torch.Generator().manual_seed(1)) * 4
    token_ids = torch.arange(300) * 600
    here, there = (prompt_logprobs(logits.to(d), token_ids.to(d), 5) for d in ("cpu", device))
    assert [(a.token_id, a.rank, [t for t, _ in a.top]) for a in here] == [
        (b.token_id, b.rank, [t for t, _ in b.top]) for b in there
    ]
    assert [a.logprob for a in here] == pytest.approx([b.logprob for b in there], abs=5e-6, rel=5e-7)
