"""`l4 bench serve` against a server whose times and mistakes are known."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fake_openai import TOKEN_SECONDS, Fake, serving
from l4core.bench.client import Record, Target
from l4core.bench.datasets import Lengths
from l4core.bench.load import Load, Run, arrivals, gaps, keeps, point
from l4core.bench.serve import Plan, as_json, parse_ids, parse_limits, parse_loads, sweep
from l4core.bench.stats import percentile, summary
from l4core.cli.errors import run as run_cli
from l4core.cli.main import l4
from l4core.errors import ConfigError, L4Error

LENGTHS = Lengths(input=6, output=5)


def loaded(fake: Fake, loads: list[Load], **changes: Any) -> dict[str, Any]:
    plan = Plan(**{"loads": loads, "lengths": LENGTHS, "num_prompts": 12, **changes})
    target = Target(url=fake.url, timeout=changes.pop("timeout", 30.0))
    return sweep(target, plan)


def test_every_request_is_answered_and_counted_once() -> None:
    with serving(Fake()) as fake:
        found = loaded(fake, [Load(concurrency=3), Load(rate=200.0)])
    for each in found["points"]:
        assert (each["requests"], each["ok"], each["errors"]) == (12, 12, {})
        assert (each["input_tokens"], each["output_tokens"], each["cached_tokens"]) == (72, 60, 36)
        assert each["ttft_ms"]["p50"] >= 5
        assert each["tpot_ms"]["p50"] >= TOKEN_SECONDS * 1e3
        assert each["e2e_ms"]["p50"] >= 5 + 5 * TOKEN_SECONDS * 1e3
        assert each["output_tokens_per_s"] == pytest.approx(60 / each["seconds"])
    assert fake.most >= 3
    assert len(fake.seen) == 25  # and the warm-up
    assert all(body["stream_options"] == {"include_usage": True} and body["ignore_eos"] for body in fake.seen)
    prompts = [tuple(body["prompt"]) for body in fake.seen]
    assert len(set(prompts)) == 25


def test_a_closed_loop_has_as_many_in_flight_as_asked() -> None:
    with serving(Fake()) as fake:
        loaded(fake, [Load(concurrency=4)], warmup=0, num_prompts=20)
    assert fake.most == 4


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ("drop", "connection"),
        ("429", "HTTP 429"),
        ("cut", "connection"),
        ("error", "error event"),
        ("short", "wrong length"),
        ("no usage", "no usage"),
        ("hang", "timeout"),
    ],
)
def test_what_goes_wrong_is_counted_by_kind_and_hides_nothing_else(wrong: str, kind: str) -> None:
    """Every third request fails; the warm-up is request 0."""
    with serving(Fake(misbehave=lambda number: wrong if number % 3 == 1 else "")) as fake:
        target = Target(url=fake.url, timeout=2.0 if wrong == "hang" else 30.0)
        found = sweep(target, Plan(loads=[Load(rate=float("inf"))], lengths=LENGTHS, num_prompts=9))
    (each,) = found["points"]
    assert each["errors"] == {kind: 3}
    assert (each["requests"], each["ok"]) == (9, 6)
    assert each["output_tokens"] == 30
    assert each["first_error"]


def test_a_stream_that_ends_by_closing_is_read_too_and_chat_asks_with_text() -> None:
    with serving(Fake(chunked=False)) as fake:
        target = Target(url=fake.url + "/v1/", endpoint="chat", api_key="key")
        found = sweep(target, Plan(loads=[Load(concurrency=2)], lengths=LENGTHS, num_prompts=4))
    assert found["points"][0]["ok"] == 4
    assert {body["path"] for body in fake.seen} == {"/v1/chat/completions"}
    assert all(len(body["messages"][0]["content"].split()) == 6 for body in fake.seen)
    assert all(headers["authorization"] == "Bearer key" for headers in fake.headers)
    assert "key" not in as_json(found)


def test_the_first_refusal_ends_it_with_the_servers_words() -> None:
    with serving(Fake(misbehave=lambda number: "429")) as fake, pytest.raises(L4Error, match="the queue is full"):
        loaded(fake, [Load(concurrency=1)])
    with pytest.raises(ConfigError, match="no answer"):
        sweep(Target(url="http://127.0.0.1:9"), Plan(loads=[Load(concurrency=1)]))


def test_an_intruder_is_timed_apart() -> None:
    with serving(Fake()) as fake:
        found = loaded(fake, [Load(concurrency=4)], intrude=500)
    intruder = found["points"][0]["intruder"]
    assert intruder["input_tokens"] == 500
    assert intruder["ttft_ms"] >= 5
    assert intruder["itl_ms"]["p50"] > 0
    assert found["points"][0]["requests"] == 12


# --- what a seed fixes, and the sums ------------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_requests_and_another_gives_others(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(
        json.dumps(
            [
                {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a" * 40}]}
                for i in range(30)
            ]
            + [{"conversations": []}, "noise", {"conversations": [{"from": "gpt", "value": "x"}] * 2}]
        )
    )
    plans = {
        "random": {"lengths": Lengths(input=50, output=20, spread=0.5)},
        "shared-prefix": {"lengths": LENGTHS, "prefix": 9, "num_prefixes": 2},
        "sharegpt": {"path": tmp_path / "talk.json"},
    }
    for dataset, options in plans.items():
        made = [
            Plan(**{"loads": [], "dataset": dataset, "num_prompts": 8, "seed": seed, **options}).samples(index)
            for seed, index in ((7, 0), (7, 0), (8, 0), (7, 1))
        ]
        assert made[0] == made[1]
        assert made[0] != made[2] != made[3] != made[0]
        assert len(made[0]) == 8
    shared = Plan(loads=[], dataset="shared-prefix", num_prompts=4, prefix=9, num_prefixes=2, lengths=LENGTHS).samples(
        0
    )
    assert shared[0].prompt[:9] == shared[2].prompt[:9] != shared[1].prompt[:9]
    assert all(len(sample.prompt) == 15 for sample in shared)
    talk = Plan(loads=[], dataset="sharegpt", num_prompts=40, path=tmp_path / "talk.json").samples(0)
    assert {sample.max_tokens for sample in talk} == {10}
    lengths = [len(s.prompt) for s in Plan(loads=[], lengths=Lengths(input=100, output=1, spread=0.2)).samples(0)]
    assert min(lengths) >= 80
    assert max(lengths) <= 120


def test_arrivals_are_poisson() -> None:
    times = list(arrivals(4000, 50.0, 1))
    waits = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(waits) == pytest.approx(0.02, rel=0.06)
    assert statistics.stdev(waits) == pytest.approx(0.02, rel=0.1)
    assert list(arrivals(3, float("inf"), 1)) == [0, 0, 0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    import numpy as np

    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)
    random.Random(0).shuffle(values)
    assert summary(values)["max"] == max(values)


def record(times: list[float], end: float, **changes: Any) -> Record:
    return Record(**{"due": 1.0, "sent": 1.0, "times": times, "end": end, "num_output": len(times), **changes})


def test_the_sums_of_two_requests_made_by_hand() -> None:
    a, b = record([1.1, 1.2, 1.4], 1.4, num_input=10), record([2.0, 2.1, 2.2], 2.2, num_input=20, due=1.5, sent=1.6)
    bad = Record(due=1.0, sent=1.0, end=3.0, error="timeout", detail="timeout")
    found = point(Run(records=[a, b, bad]), Load(concurrency=2), {"ttft": 200, "itl": 250})
    assert found["seconds"] == pytest.approx(2.0)
    assert found["errors"] == {"timeout": 1}
    assert (found["requests_per_s"], found["output_tokens_per_s"], found["total_tokens_per_s"]) == (1, 3, 18)
    assert found["ttft_ms"]["mean"] == pytest.approx(300)  # 100 and 500: from when it was due
    assert found["tpot_ms"]["max"] == pytest.approx(150)
    assert gaps(a) == pytest.approx([100, 200])
    assert found["goodput_per_s"] == pytest.approx(0.5)
    assert keeps(a, {"e2e": 401})
    assert not keeps(a, {"itl": 150})


def test_words_on_the_command_line() -> None:
    assert [load.name for load in parse_loads("1,2.5,inf", "4")] == ["1/s", "2.5/s", "inf/s", "4 at once"]
    assert [load.concurrency for load in parse_loads(None, None)] == [1, 8, 32]
    assert parse_limits("ttft=500, tpot=50") == {"ttft": 500, "tpot": 50}
    assert parse_ids("3:5") == range(3, 5)
    for wrong in (lambda: parse_loads("x", None), lambda: parse_loads(None, "0"), lambda: parse_limits("p99=1")):
        with pytest.raises(ConfigError):
            wrong()
    for text in ("5", "5:5", "a:b"):
        with pytest.raises(ConfigError):
            parse_ids(text)


def test_the_command_prints_a_table_and_writes_json_and_charts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Fake(misbehave=lambda number: "429" if number == 3 else "")) as fake:
        status = run_cli(
            l4,
            [
                *("bench", "serve", "--url", fake.url, "--rates", "100,inf", "--num-prompts", "6", "--input-len", "4"),
                *("--output-len", "3", "--sla", "ttft=1000", "--out", f"{tmp_path}/r.json", "--plot", f"{tmp_path}/p"),
                *("--floor", "scout", "--bandwidth", "3030"),
            ],
            program="l4",
        )
    printed = capsys.readouterr()
    assert status == 0
    assert "inf/s" in printed.out
    assert "floor ms" in printed.out
    assert "1 × HTTP 429" in printed.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert [p["rate"] for p in found["points"]] == [100, "inf"]
    assert found["points"][0]["floor_ms"] > 5
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"ttft.svg", "tpot.svg", "itl.svg", "e2e.svg"}


def test_a_model_for_the_floor_that_does_not_exist_is_told_before_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake()) as fake:
        asked = ["--url", fake.url, "--num-prompts", "2", "--floor", "scuot", "--bandwidth", "3030"]
        assert run_cli(l4, ["bench", "serve", *asked], program="l4") == 2
        assert not fake.seen
    assert "--floor is 'scuot'" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with serving(Fake()) as fake:
        for option, place in (("--out", "file/r.json"), ("--plot", "file/p")):
            asked = ["bench", "serve", "--url", fake.url, "--num-prompts", "2", option, f"{tmp_path}/{place}"]
            assert run_cli(l4, asked, program="l4") == 2
            assert f"error: {option} " in capsys.readouterr().err
        assert not fake.seen


def test_a_run_without_any_answer_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(misbehave=lambda number: "429" if number else "")) as fake:
        arguments = ["bench", "serve", "--url", fake.url, "--num-prompts", "2", "--output-len", "3", "--input-len", "4"]
        assert run_cli(l4, arguments, program="l4") == 1
    assert "no request ended well" in capsys.readouterr().err
