"""What is compiled ahead is what real launches ask for later; where it cannot be done the start-up line says so."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from l4core.engine.start.compile_ahead import _Workers
from l4core.engine.start.rehearsal import ADDRESS, WithoutMemory, first_batches

CUDA = torch.device("cuda")


def ahead(case: str) -> tuple[dict[str, Any], str]:
    """In a process of its own: the first import of Triton decides whether its interpreter is used, and other tests want it. → found, log."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    script = Path(__file__).with_name("compile_ahead_script.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), case],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_later_launches_find_their_kernels() -> None:
    found, log = ahead("all")
    assert found["ahead"] == 6, "three constants, twice: an output that is aligned, and one that is not"
    assert found["later"] == 0
    assert found["restored"]
    assert found["line"].startswith("6 compiled ahead, ")
    assert log == ""


def test_what_a_sample_shows_to_be_in_the_cache_is_left_there() -> None:
    found, _ = ahead("warm")
    assert (found["ahead"], found["later"]) == (0, 5)
    assert found["line"].startswith("in Triton's cache, as a sample of 1 shows")


def test_a_rehearsal_that_fails_is_named_and_what_it_launched_is_compiled() -> None:
    found, log = ahead("broken")
    assert (found["ahead"], found["later"], found["restored"]) == (6, 0, True)
    assert found["line"].endswith("the rest when launched: NotImplementedError: a vendor's kernel")
    assert "not all kernels are compiled ahead" in log


def test_a_triton_without_asynchronous_compilation_compiles_as_it_launches() -> None:
    found, log = ahead("missing")
    assert (found["ahead"], found["later"]) == (0, 6)
    assert found["line"].startswith("compiled one by one when first launched (ModuleNotFoundError: ")
    assert "not all kernels are compiled ahead" in log


def test_ranks_are_counted_by_the_cache_they_share() -> None:
    found, _ = ahead("ranks")
    assert found == {"place": [1, 2], "alone": [0, 1]}


def test_each_rank_does_its_share_first_and_then_the_others() -> None:
    done: list[list[int]] = [[], []]
    with ThreadPoolExecutor(1) as pool:
        workers = [_Workers(pool, rank, 2) for rank in range(2)]
        for job in range(5):
            for rank in range(2):
                workers[rank].submit(done[rank].append, job)
        for future in workers[0].own + workers[1].own:
            future.result(10)
        assert done == [[0, 2, 4], [1, 3]]
        for each in workers:
            each.begin_others()
    assert done == [[0, 2, 4, 1, 3], [1, 3, 0, 2, 4]]
    assert all(future.done() for future in workers[0].futures)


def test_tensors_without_memory_pass_for_those_of_the_device() -> None:
    host = torch.arange(6)
    with WithoutMemory(CUDA):
        x = torch.zeros(4, 6, dtype=torch.int64, device=CUDA, pin_memory=False)
        y = host.to(CUDA, non_blocking=True) + x[1]
        assert (x.device.type, x.is_cuda, y.device.type, y.new_empty(2).is_cuda) == ("cuda", True, "cuda", True)
        assert (x.data_ptr(), x[0, 1:].data_ptr()) == (ADDRESS, ADDRESS + 8)
        assert torch.empty(6, dtype=torch.int64, pin_memory=True).copy_(y, non_blocking=True).shape == (6,)
        assert (host.device.type, host.is_cuda, host.tolist()) == ("cpu", False, list(range(6)))
    assert (x.device.type, y.device.type) == ("meta", "meta")


def test_first_batches_are_prompts_of_every_order_of_length() -> None:
    batches = list(first_batches(8192, 48, 4096))
    alone = {batch.num_tokens for batch in batches if len(batch.sequences) == 1}
    assert alone == {1 << power for power in range(13)} | {(1 << power) + 1 for power in range(12)}
    assert {len(batch.sequences) for batch in batches} == {1, 3, 4, 16, 17}
    assert all(batch.num_tokens <= 8192 for batch in batches)
    assert max(batch.num_tokens for batch in first_batches(2, 1, None)) == 2
