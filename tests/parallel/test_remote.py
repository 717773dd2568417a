"""`LLM(tp=2)`: the ranks are processes, and die or end without this one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers.processes import lives
from l4core import LLM, SamplingParams
from l4core.errors import CheckpointError, EngineDeadError, RequestError

PROMPTS = [list(range(1, 150)), [3, 4], [9] * 70]


def workers() -> set[psutil.Process]:
    """Children of this process that hold an engine: other modules' fixtures may keep theirs for the whole run."""
    return {child for child in psutil.Process().children() if "l4core.engine.process.worker" in child.cmdline()}


@pytest.fixture(scope="module")
def others() -> set[psutil.Process]:
    return workers()


@pytest.fixture(scope="module")
def two(tiny: Path, others: set[psutil.Process]) -> Iterator[LLM]:
    with LLM(tiny.as_posix(), tp=2, dtype="float32", device="cpu") as llm:
        yield llm
    assert workers() <= others


def tokens(llm: LLM, **params: object) -> list[list[int]]:
    wanted = SamplingParams(max_tokens=20, ignore_eos=True, **params)  # type: ignore[arg-type]
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, wanted, use_tqdm=False)]


def test_it_writes_what_one_rank_writes(two: LLM, tiny: Path) -> None:
    with LLM(tiny.as_posix(), dtype="float32", device="cpu") as one:
        for params in ({"temperature": 0.0}, {"temperature": 0.7, "seed": 3}):
            assert tokens(two, **params) == tokens(one, **params)
        assert two.context_length == one.context_length
    assert any("2 compute the model together" in line for line in two.report)


def test_what_a_sampler_refuses_is_refused_before_anything_is_computed(two: LLM) -> None:
    with pytest.raises(RequestError, match="unknown sampler 'x'"):
        two.generate([[1]], SamplingParams(sampler="x"), use_tqdm=False)
    assert len(tokens(two, temperature=0.0)) == 3


def test_a_killed_rank_is_an_error_and_no_process_is_left(two: LLM, others: set[psutil.Process]) -> None:
    """The last test: the engine is of no use afterwards."""
    (nursery,) = workers() - others
    ranks = nursery.children()
    ranks[1].kill()
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="of rank 1 was ended by signal SIGKILL"):
            tokens(two, temperature=0.0)
    two.close()
    assert not any(map(lives, [nursery, *ranks]))


def test_what_keeps_ranks_from_starting_is_raised_here(tmp_path: Path, others: set[psutil.Process]) -> None:
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path / "nothing"), tp=2, device="cpu")
    assert workers() <= others
