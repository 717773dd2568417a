"""What a batch's draws become on the host: each token goes to the sequence that drew it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from l4core.engine.batch import Decodes, DecodesFirst, ScheduledBatch, ScheduledSequence
from l4core.engine.run.draws import PendingDraws
from l4core.request import Request, SamplingParams, TokenLogprobs
from l4core.sampling.records import Draw


class Arrived:
    """A download that is there: ids, and the largest logit of each row as draw_triton keeps it."""

    def __init__(self, ids: Sequence[int], best: Sequence[float]) -> None:
        bits = np.array(best, dtype=np.float32).view(np.int32)
        self._rows = torch.from_numpy(np.array([ids, bits], dtype=np.int64))

    def wait(self) -> torch.Tensor:
        return self._rows


def sequence(name: str, *, draws: bool) -> ScheduledSequence:
    request = Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(max_tokens=5),
        eos_token_ids=(),
        max_total_tokens=8,
    )
    return ScheduledSequence(request=request, row=0, start=0, token_ids=[1], new_pages={}, draws=draws, is_decode=draws)


def pending(which: str, best: Sequence[float] | None = None, padding: int = 0) -> PendingDraws:
    """which: "d" for a sequence that draws, "p" for a prompt that is unfinished; ids count from 10."""
    sequences = [sequence(f"{kind}{i}", draws=kind == "d") for i, kind in enumerate(which)]
    num = which.count("d")
    ids = [10 + i for i in range(num)]
    arrived = Arrived(ids + [0] * padding, [*(best or [1.0] * num), *[0.0] * padding])
    return PendingDraws(
        ScheduledBatch(step=1, sequences=sequences),
        plain=np.ones(num, dtype=bool),
        positions=np.full(num, 3),
        drawn=arrived,  # type: ignore[arg-type]
        others=None,
        prompt_logprobs={},
    )


@pytest.mark.parametrize("which", ["ddd", "dpd", "pdd", "ddp", "pp"])
@pytest.mark.parametrize("padding", [0, 1])
def test_each_token_goes_to_the_sequence_that_drew_it(which: str, padding: int) -> None:
    ids = iter(range(10, 20))
    wanted = [(f"{kind}{i}", [next(ids)] if kind == "d" else []) for i, kind in enumerate(which)]
    assert [(d.request_id, list(d.token_ids)) for d in pending(which, padding=padding).wait().drawn] == wanted


class Others:
    """What the pipeline drew."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._draws = draws

    def finish(self) -> Sequence[Draw]:
        return self._draws


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "no kernels"])
def test_only_what_is_more_than_a_token_gets_a_record(by_kernels: bool) -> None:
    """Five decodes as columns: the third has log-probabilities, the fourth no token, the second is drawn by the pipeline and is a token all the same;
    a prompt behind them draws too, and one does not."""
    states = [sequence(f"d{i}", draws=True) for i in range(5)]
    numbers = np.arange(5, dtype=np.int64)
    columns = Decodes(rows=numbers, starts=numbers + 6, token_ids=numbers, new_pages={}, states=states)
    others = [sequence("p", draws=False), sequence("e", draws=True)]
    logprobs = TokenLogprobs(token_id=32, logprob=-1.0, rank=1)
    piped = {1: Draw(token_id=31), 2: Draw(token_id=32, logprobs=logprobs)}
    if not by_kernels:
        fault = Draw(token_id=None, error="no number")
        piped = {0: Draw(token_id=10), **piped, 3: fault, 4: Draw(token_id=14), 5: Draw(token_id=15)}
    arrived = Arrived([10, 11, 12, 13, 14, 15, 0], [1, 1, 1, float("nan"), 1, 1, 0])
    tokens = PendingDraws(
        ScheduledBatch(step=1, sequences=DecodesFirst(columns, others)),
        plain=np.array([i not in piped for i in range(6)]),
        positions=np.array([7, 8, 9, 10, 11, 3]),
        drawn=arrived if by_kernels else None,  # type: ignore[arg-type]
        others=Others(list(piped.values())),  # type: ignore[arg-type]
        prompt_logprobs={"p": [None, logprobs]},
    ).wait()
    assert tokens.decoded == [10, 31, -1, -1, 14]
    found = [(d.request_id, list(d.token_ids), list(d.logprobs), list(d.prompt_logprobs)) for d in tokens.drawn]
    beside = [("d2", [32], [logprobs], []), ("d3", [], [], []), ("p", [], [], [None, logprobs]), ("e", [15], [], [])]
    assert found == beside
    assert [("no" in d.error or "NaN" in d.error) for d in tokens.drawn] == [False, True, False, False]


def test_a_row_without_a_number_ends_its_sequence_alone() -> None:
    drawn = pending("dpdd", best=[1.0, float("nan"), 2.0]).wait().drawn
    assert [list(d.token_ids) for d in drawn] == [[10], [], [], [12]]
    assert [bool(d.error) for d in drawn] == [False, False, True, False]
