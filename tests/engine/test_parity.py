"""The first oracle: transformers in float32, one unpadded sequence at a time (it is wrong on left-padded batches).

What is compared went through the whole engine: scheduler, block tables, chunked metadata, backend, paged KV.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from helpers.cpu import cpu_backends
from helpers.profile import DEVICE
from helpers.recording import Recorder, greedy
from l4core import LLM

CHUNK = 64
VARIANTS = {
    "step1": {},
    "step2": {"step": 2},
    "no_qk_norm": {"qk_norm": False},
    "scaled_rope": {"scaled_rope": True},
    "step2_no_qk_norm_scaled_rope": {"step": 2, "qk_norm": False, "scaled_rope": True},
}


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@functools.cache
def oracle(folder: Path) -> torch.nn.Module:
    from transformers import Llama4ForCausalLM

    return Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def oracle_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """One full forward pass without a cache."""
    return oracle(folder)(torch.tensor([ids]), use_cache=False).logits[0]


BACKENDS = cpu_backends() if DEVICE == "cpu" else ["reference", "sdpa", "triton"]
"""On a GPU l4-triton joins them: the one backend with IEEE float32 there."""


@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        *((name, BACKENDS[-1]) for name in VARIANTS),
        *((name, other) for name in ("step1", "step2") for other in BACKENDS[:-1]),
    ],
)
def test_logits_of_prefill_and_decode_equal_transformers(make_tiny, variant: str, backend: str) -> None:
    """Whole prompt of 300 tokens (pieces end at chunk borders) and 20 decoded tokens: max |Δ logit| ≤ 1e-4 at every position."""
    folder = make_tiny(chunk=CHUNK, **VARIANTS[variant])
    llm = LLM(folder.as_posix(), dtype="float32", device=DEVICE, attention_backend=backend, progress=False)
    recorder = Recorder(llm)
    ids = prompt_ids(300)
    output = llm.generate([ids], greedy(20))[0].outputs[0]
    ours = recorder.stacked(0)
    assert ours.shape[0] == 319
    theirs = oracle_logits(folder, ids + output.token_ids[:-1])
    assert (ours - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.5, "logits this flat would hide wrong attention"


@pytest.mark.parametrize("piece", [7, 17, 50, 100, 150])
def test_chunked_prefill_equals_transformers(tiny: Path, piece: int) -> None:
    llm = LLM(tiny.as_posix(), dtype="float32", device=DEVICE, chunked_prefill_size=piece, progress=False)
    recorder = Recorder(llm)
    ids = prompt_ids(331)
    llm.generate([ids], greedy(1))
    assert (recorder.stacked(0) - oracle_logits(tiny, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
def test_greedy_decode_over_two_borders_equals_argmax_of_full_forward(tiny: Path, page_size: int) -> None:
    """200 greedy tokens from a 40-token prompt cross the borders at 64, 128 and 192: every token is transformers' arg-max."""
    llm = LLM(tiny.as_posix(), dtype="float32", device=DEVICE, page_size=page_size, progress=False)
    ids = prompt_ids(40)
    tokens = llm.generate([ids], greedy(200))[0].outputs[0].token_ids
    expected = oracle_logits(tiny, ids + tokens[:-1])[39:].argmax(-1).tolist()
    assert tokens == expected


LENGTHS = [1, 2, 62, 63, 64, 65, 66, 100, 126, 127, 128, 129, 130, 191, 192, 193]


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(tiny: Path, page_size: int) -> None:
    """16 requests around the borders in one batch: the same tokens, and logprobs within 1e-5, as alone."""
    llm = LLM(
        tiny.as_posix(), dtype="float32", device=DEVICE, page_size=page_size, chunked_prefill_size=90, progress=False
    )
    prompts = [prompt_ids(n, seed=n) for n in LENGTHS]
    params = greedy(24, logprobs=3)
    together = llm.generate(prompts, params)
    for prompt, batched in zip(prompts, together, strict=True):
        alone = llm.generate([prompt], params)[0].outputs[0]
        mine = batched.outputs[0]
        assert mine.token_ids == alone.token_ids, f"prompt of {len(prompt)} tokens"
        assert mine.logprobs is not None
        assert alone.logprobs is not None
        for a, b in zip(mine.logprobs, alone.logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_float64_reference_is_the_second_oracle(tiny: Path) -> None:
    """The same model computed in float64 by the reference backend agrees with float32 transformers to float32 accuracy, and no better."""
    ids = prompt_ids(150)
    logits = {}
    for dtype in ("float64", "float32"):
        llm = LLM(tiny.as_posix(), dtype=dtype, device=DEVICE, attention_backend="reference", progress=False)
        recorder = Recorder(llm)
        llm.generate([ids], greedy(1))
        logits[dtype] = recorder.stacked(0).double()
    theirs = oracle_logits(tiny, ids).double()
    assert (logits["float64"] - theirs).abs().max() <= 1e-4
    assert 0 < (logits["float64"] - logits["float32"]).abs().max() <= 1e-4
