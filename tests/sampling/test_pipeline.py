"""One step: checks, groups, forbidden ids, log-probabilities of the raw logits, and failures that stay with their row."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from l4core.errors import RequestError
from l4core.plugin_api import Sampler, SamplerRow, SamplingParams
from l4core.plugin_ops.sampling import UNCHANGED
from l4core.sampling.draw import draw_by_law
from l4core.sampling.pipeline import DrawRow, SamplingPipeline
from l4core.sampling.records import DrawKey

INF = math.inf
MakePipeline = Callable[..., SamplingPipeline]
MakeRow = Callable[..., DrawRow]


class Steer(Sampler):
    """sampler_args: `to`: the only token that may be drawn; `do`: a way to go wrong. Notes the calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.seen: list[SamplerRow] = []

    def parse(self, params: SamplingParams) -> object:
        if params.sampler_args.get("do") == "refuse":
            raise ValueError("steer: this is refused")
        return dict(params.sampler_args)

    def transform(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        self.calls.append(len(rows))
        self.seen += rows
        assert logits.isfinite().any(dim=1).all()
        assert not logits.isnan().any()
        for i, row in enumerate(rows):
            assert isinstance(row.parsed, dict)
            do = row.parsed.get("do")
            if do == "raise":
                raise KeyError("lost")
            if do == "half":
                return logits.half()
            logits[i] = {"nan": math.nan, "forbid": -INF}.get(do, logits[i])
            if "to" in row.parsed:
                logits[i] = -INF
                logits[i, row.parsed["to"]] = 0.0
        return logits


def logits_for(num: int, vocab_size: int = 50) -> torch.Tensor:
    return torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(num)) * 2


# ---------------------------------------------------------------- check


def test_unknown_samplers_are_named_with_the_nearest(pipeline: MakePipeline) -> None:
    made = pipeline(10, xtc=Steer())
    with pytest.raises(
        RequestError, match="unknown sampler 'defualt'; known: default, xtc; did you mean 'default'"
    ) as found:
        made.check(SamplingParams(sampler="defualt"))
    assert (found.value.status, found.value.param) == (400, "sampler")
    with pytest.raises(RequestError, match="known: default, xtc; install the plugin"):
        made.check(SamplingParams(sampler="mirostat"))


def test_what_a_sampler_refuses_is_a_request_error(pipeline: MakePipeline) -> None:
    with pytest.raises(RequestError, match="steer: this is refused") as found:
        pipeline(10, steer=Steer()).check(SamplingParams(sampler="steer", sampler_args={"do": "refuse"}))
    assert (found.value.status, found.value.param) == (400, "sampler_args")


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_refused(pipeline: MakePipeline, field: str) -> None:
    made = pipeline(10)
    inside, outside = ({9: 1.0}, {10: 1.0}) if field == "logit_bias" else ((9,), (10,))
    made.check(SamplingParams(**{field: inside}))
    with pytest.raises(RequestError, match=f"{field} names token id 10; wanted ids from 0 to 9") as found:
        made.check(SamplingParams(**{field: outside}))
    assert (found.value.status, found.value.param) == (400, field)


def test_check_returns_what_parse_returned(pipeline: MakePipeline) -> None:
    made = pipeline(10, steer=Steer())
    assert made.check(SamplingParams(sampler="steer", sampler_args={"to": 3})) == {"to": 3}
    assert made.check(SamplingParams()) is UNCHANGED


# ---------------------------------------------------------------- tokens


def test_greedy_rows_are_the_argmax(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(50)
    logits = logits_for(6)
    draws = made.sample(logits, [draw_row(made, temperature=0.0, seed=None) for _ in range(6)])
    assert [d.token_id for d in draws] == logits.argmax(1).tolist()
    assert all(d.error == "" and d.logprobs is None for d in draws)


def test_sampled_rows_follow_the_law_and_leave_the_logits(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(50)
    logits = logits_for(6)
    before = logits.clone()
    rows = [draw_row(made, temperature=0.9, seed=i - 3, position=2**33 + i) for i in range(6)]
    keys = [DrawKey(temperature=0.9, seed=i - 3, position=2**33 + i) for i in range(6)]
    assert [d.token_id for d in made.sample(logits, rows)] == draw_by_law(logits, keys).tolist()
    made.sample(logits, [draw_row(made, top_p=0.5, logit_bias={1: 5.0}, forbidden=[2]) for _ in range(6)])
    assert torch.equal(logits, before)


def mixed_rows(made: SamplingPipeline, draw_row: MakeRow) -> list[DrawRow]:
    """64 requests of every kind."""
    return [
        draw_row(
            made,
            prompt=[1, 2, 3],
            output=list(range(i % 9)),
            position=3 + i % 9,
            forbidden=[0, 5] if i % 5 == 0 else [],
            seed=i // 3,
            temperature=[0.0, 0.4, 1.0, 2.0][i % 4],
            top_p=[1.0, 0.9, 0.5][i % 3],
            top_k=[0, 0, 7][i % 3],
            min_p=[0.0, 0.02][i % 2],
            repetition_penalty=[1.0, 1.0, 1.2, 1.0, 0.9][i % 5],
            logprobs=[None, 0, 3, 20][i % 4],
            sampler="steer" if i % 7 == 0 else "default",
        )
        for i in range(64)
    ]


@pytest.mark.parametrize("vocab_size", [50, 30_011])
def test_a_row_alone_inside_64_and_in_another_order(pipeline: MakePipeline, draw_row: MakeRow, vocab_size: int) -> None:
    """Tokens and log-probabilities to the last bit."""
    made = pipeline(vocab_size, steer=Steer())
    rows = mixed_rows(made, draw_row)
    logits = logits_for(64, vocab_size) * torch.linspace(0.2, 5, 64)[:, None]
    together = made.sample(logits, rows)
    assert together == made.sample(logits, rows)
    assert together == made.sample(logits.flip(0), rows[::-1])[::-1]
    assert together == [
        pipeline(vocab_size, steer=Steer()).sample(x[None].clone(), [r])[0] for x, r in zip(logits, rows, strict=True)
    ]
    assert len({d.token_id for d in together}) > 20


def test_full_vocabulary_spans_several_blocks(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(202_048)
    logits = logits_for(7, 202_048)
    rows = [draw_row(made, temperature=0.7, top_p=[1.0, 0.9][i % 2], position=i, logprobs=2) for i in range(7)]
    together = made.sample(logits, rows)
    assert together == [made.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(7)]


def test_a_sampler_sees_its_rows_only(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    steer = Steer()
    made = pipeline(50, steer=steer)
    rows = [
        draw_row(made, temperature=0.0),
        draw_row(
            made, sampler="steer", sampler_args={"to": 17}, prompt=[4, 5], output=[6], position=3, temperature=1.0
        ),
        draw_row(made, top_k=1, temperature=1.0),
        draw_row(made, sampler="steer", sampler_args={"to": 23}, temperature=0.0),
    ]
    logits = logits_for(4)
    best = logits.argmax(1).tolist()
    assert [d.token_id for d in made.sample(logits, rows)] == [best[0], 17, best[2], 23]
    assert steer.calls == [2]
    seen = steer.seen[0]
    assert (list(seen.prompt_token_ids), list(seen.output_token_ids), seen.position) == ([4, 5], [6], 3)
    assert (seen.params, seen.parsed) == (rows[1].params, {"to": 17})


def test_prompts_are_converted_once_and_never_confused(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    steer = Steer()
    made = pipeline(50, steer=steer)
    rows = [draw_row(made, prompt=[i, i + 1], sampler="steer") for i in range(3)]
    for _ in range(2):
        made.sample(logits_for(3), rows)
    assert [list(s.prompt_token_ids) for s in steer.seen] == [[0, 1], [1, 2], [2, 3]] * 2
    assert all(a.prompt_token_ids is b.prompt_token_ids for a, b in zip(steer.seen[:3], steer.seen[3:], strict=True))
    for i in range(50):  # new lists may get the memory, and so the id, of forgotten ones
        made.sample(logits_for(1), [draw_row(made, prompt=[i] * 3, sampler="steer")])
        assert list(steer.seen[-1].prompt_token_ids) == [i] * 3


# ---------------------------------------------------------------- forbidden ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [{}, {7: 50.0}])
def test_forbidden_ids_are_never_drawn(
    pipeline: MakePipeline, draw_row: MakeRow, temperature: float, bias: dict[int, float]
) -> None:
    """Not even with a bias for them; the model's log-probability is still that of the raw logits."""
    made = pipeline(8)
    logits = torch.zeros(20, 8)
    logits[:, [2, 7]] = torch.tensor([9.0, 10.0])
    rows = [
        draw_row(made, forbidden=[7, 2], temperature=temperature, position=i, logit_bias=bias, logprobs=1)
        for i in range(20)
    ]
    draws = made.sample(logits, rows)
    assert not {d.token_id for d in draws} & {2, 7}
    for draw in draws:
        assert draw.logprobs is not None
        assert draw.logprobs.top[0][0] == 7
        assert abs(draw.logprobs.logprob - float(logits[0].double().log_softmax(0)[0])) < 1e-5


def test_only_the_row_that_forbids_is_changed(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(4)
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 3)
    rows = [
        draw_row(made, temperature=0.0),
        draw_row(made, temperature=0.0, forbidden=[1, 3]),
        draw_row(made, temperature=0.0),
    ]
    assert [d.token_id for d in made.sample(logits, rows)] == [1, 2, 1]


# ---------------------------------------------------------------- logprobs


def test_logprobs_are_those_of_the_raw_logits(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(50)
    logits = logits_for(4)
    wanted = logits.double().log_softmax(1)
    rows = [
        draw_row(made, temperature=3.0, top_k=20, presence_penalty=2.0, output=[1], position=i, logprobs=n)
        for i, n in enumerate((0, 2, 20))
    ]
    rows.append(draw_row(made, position=3))
    draws = made.sample(logits, rows)
    for i, draw in enumerate(draws[:3]):
        assert draw.logprobs is not None
        chosen = wanted[i, draw.token_id]
        assert draw.logprobs.token_id == draw.token_id
        assert abs(draw.logprobs.logprob - float(chosen)) < 1e-5
        assert draw.logprobs.rank == int((wanted[i] > chosen).sum()) + 1
        assert [t for t, _ in draw.logprobs.top] == wanted[i].topk((0, 2, 20)[i]).indices.tolist()
    assert draws[3].logprobs is None


# ---------------------------------------------------------------- failures


def test_bad_logits_end_their_row_alone(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    steer = Steer()
    made = pipeline(50, steer=steer)
    logits = logits_for(12)
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}, {"sampler": "steer"}]
    rows = [draw_row(made, position=i, **kinds[i % 3]) for i in range(12)]
    clean = made.sample(logits, rows)
    spoilt = logits.clone()
    spoilt[0, 3] = spoilt[1, 49] = spoilt[2, 0] = math.nan
    spoilt[3:6] = -INF
    spoilt[6, 1] = spoilt[7, 1] = spoilt[8, 1] = INF
    draws = made.sample(spoilt, rows)
    for draw, what in zip(draws[:9], ["NaN"] * 3 + ["no finite number"] * 3 + ["+inf"] * 3, strict=True):
        assert draw.token_id is None
        assert draw.logprobs is None
        assert what in draw.error
    assert draws[0].error == "the model's logits at position 0 hold NaN; wanted finite numbers"
    assert draws[9:] == clean[9:]


@pytest.mark.parametrize(
    ("do", "text"),
    [
        ("raise", "sampler 'steer' raised KeyError: 'lost'"),
        (
            "half",
            "sampler 'steer' raised ValueError: transform returned torch.float16 [1, 50]; wanted torch.float32 [1, 50]",
        ),
        ("nan", "sampler 'steer' left NaN at position 2"),
        ("forbid", "sampler 'steer' left no token that may be drawn at position 2"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_failing_transform_ends_its_row_alone(
    pipeline: MakePipeline, draw_row: MakeRow, do: str, text: str, temperature: float
) -> None:
    made = pipeline(50, steer=Steer())
    logits = logits_for(5)
    args = [{}, {"to": 4}, {"do": do}, {"to": 9}]
    rows = [
        draw_row(made, position=i, sampler="steer", sampler_args=a, temperature=temperature) for i, a in enumerate(args)
    ]
    rows.append(draw_row(made, position=4, temperature=temperature))
    draws = made.sample(logits, rows)
    assert draws[2].token_id is None
    assert draws[2].error == text
    assert [draws[1].token_id, draws[3].token_id] == [4, 9]
    others = [0, 1, 3, 4]
    assert [draws[i] for i in others] == made.sample(logits[others], [rows[i] for i in others])


def test_forbidding_every_token_ends_the_row(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(3)
    for temperature in (0.0, 1.0):
        for extra in ({}, {"top_p": 0.5, "top_k": 2, "min_p": 0.1, "logit_bias": {0: 1.0}}):
            row = draw_row(made, forbidden=[0, 1, 2], temperature=temperature, position=6, **extra)
            (draw,) = made.sample(torch.zeros(1, 3), [row])
            assert draw.token_id is None
            assert draw.error == "every token is forbidden at position 6; min_tokens leaves none to draw"


def test_wrong_shape_is_a_bug_of_the_caller(pipeline: MakePipeline, draw_row: MakeRow) -> None:
    made = pipeline(50)
    rows = [draw_row(made)]
    for logits in (logits_for(2), logits_for(1, 49), logits_for(1).double()):
        with pytest.raises(ValueError, match=r"wanted float32 \[1, 50\]"):
            made.sample(logits, rows)
    with pytest.raises(ValueError, match="no seed"):
        made.sample(logits_for(1), [draw_row(made, seed=None)])
    assert made.sample(torch.empty(0, 50), []) == []
