"""Log-probabilities, ranks and top lists against float64, ties, and independence of the batch."""

import pytest
import torch

from l4core.sampling import logprobs
from l4core.sampling.logprobs import prompt_logprobs


def some_logits(num: int, vocab_size: int) -> torch.Tensor:
    return (
        torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 20, num)[:, None]
    )


@pytest.fixture(params=["host", "device"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a way for CPUs and one for every other device; "device" sends CPU tensors down the other way."""
    if request.param == "device":
        monkeypatch.setattr(logprobs, "_on_host", logprobs.by_definition)


@pytest.mark.parametrize(("num", "vocab_size", "top"), [(40, 300, 5), (3, 202_048, 20), (12, 150_000, 3), (2, 4, 9)])
def test_against_float64(num: int, vocab_size: int, top: int) -> None:
    logits = some_logits(num, vocab_size)
    token_ids = torch.arange(num) * (vocab_size // num) % vocab_size
    lines = prompt_logprobs(logits, token_ids, top)
    wanted = logits.double().log_softmax(1)
    assert [line.token_id for line in lines] == token_ids.tolist()
    for i, line in enumerate(lines):
        chosen = wanted[i, line.token_id]
        assert line.logprob == pytest.approx(float(chosen), abs=2e-6, rel=2e-7)
        assert line.rank == int((wanted[i] > chosen).sum()) + 1
        best = wanted[i].topk(min(top, vocab_size))
        assert [token for token, _ in line.top] == best.indices.tolist()
        assert [x for _, x in line.top] == pytest.approx(best.values.tolist(), abs=2e-6, rel=2e-7)


def test_equal_logits_share_a_rank_and_are_listed_by_id() -> None:
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, 2.0, -3.0, 0.0]])
    (line,) = prompt_logprobs(logits, torch.tensor([4]), 5)
    assert line.rank == 1
    assert [token for token, _ in line.top] == [1, 3, 4, 0, 2]
    (line,) = prompt_logprobs(logits, torch.tensor([2]), 0)
    assert (line.rank, line.top) == (4, ())


def test_forbidden_tokens_have_minus_infinity() -> None:
    (line,) = prompt_logprobs(torch.tensor([[1.0, -torch.inf]]), torch.tensor([1]), 2)
    assert line.logprob == -torch.inf
    assert line.top == ((0, 0.0), (1, -torch.inf))


@pytest.mark.parametrize("vocab_size", [7, 999, 202_048])
def test_a_row_alone_and_among_others(vocab_size: int) -> None:
    logits = some_logits(9, vocab_size)
    token_ids = torch.arange(9) % vocab_size
    together = prompt_logprobs(logits, token_ids, 3)
    alone = [prompt_logprobs(logits[i : i + 1].clone(), token_ids[i : i + 1], 3)[0] for i in range(9)]
    assert alone == together


def test_no_rows() -> None:
    assert prompt_logprobs(torch.empty(0, 10), torch.empty(0, dtype=torch.int64), 3) == []
