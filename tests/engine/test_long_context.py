"""Over a million tokens: what the plan promises is admitted, pieces end at chunk borders, and a step there computes what the definition says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from l4core.config import EngineConfig
from l4core.engine.batch import ScheduledBatch
from l4core.engine.inbox import Inbox
from l4core.engine.start.build import BuiltEngine, build_engine
from l4core.kv.memory import KVMemory
from l4core.model.batch import ForwardBatch
from l4core.model.config import ModelConfig
from l4core.request import FinishReason, Request, SamplingParams

CHUNK, PAGE, VOCAB = 8192, 64, 97
LENGTHS = (147 * CHUNK, 147 * CHUNK + 1)
"""1,204,224 tokens and one more, the measured one among them: the last of a chunk, the first of the next."""
CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_local_experts": 2,
    "max_position_embeddings": 10_485_760,
    "attention_chunk_size": CHUNK,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def built() -> BuiltEngine:
    config = EngineConfig(
        model="-",
        load_format="dummy",
        dtype="float32",
        device="cpu",
        attention_backend="sdpa",
        expert_kernel="torch",  # the definition reads the model's own weights
        page_size=PAGE,
        max_running_requests=2,
        max_total_tokens=1_300_000,
    )
    made = build_engine(config, progress=False, model_config=ModelConfig.from_dict(CONFIG))
    generator = torch.Generator().manual_seed(3)
    made.engine.runner.memory._units.normal_(generator=generator)
    for name, parameter in made.engine.runner.model.named_parameters():
        if "norm" not in name:
            parameter.mul_(20)  # so that attention and experts move the logits
    return made


def test_the_plan_promises_more_than_a_million(built: BuiltEngine) -> None:
    assert built.context_length == 1_300_000
    assert built.engine.runner._tables.width == {"global": math.ceil(1_300_000 / PAGE), "local": 2 * CHUNK // PAGE}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_far_out_is_what_the_definition_says(
    built: BuiltEngine, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is given pages and not computed: its keys and values are random. Then one token is decoded."""
    engine, runner = built.engine, built.engine.runner
    hidden: list[torch.Tensor] = []
    forwards: list[ForwardBatch] = []
    batches: list[ScheduledBatch] = []
    compute, build = runner.model.forward, runner.build

    def recorded(batch: ScheduledBatch) -> ForwardBatch:
        batches.append(batch)
        return build(batch)

    def decodes_only(forward: ForwardBatch, *rest: Any) -> torch.Tensor:
        if len(forward.token_ids) > 1:
            return torch.zeros(len(forward.token_ids), 32, dtype=runner.model.embed.weight.dtype)
        forwards.append(forward)
        hidden.append(compute(forward, *rest))
        return hidden[-1]

    monkeypatch.setattr(runner, "build", recorded)
    monkeypatch.setattr(runner.model, "forward", decodes_only)
    prompt = [i * 7919 % VOCAB for i in range(length - 1)]
    request = Request(
        request_id=f"long {length}",
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0, max_tokens=2, seed=0),
        eos_token_ids=(),
        max_total_tokens=length + 1,
        cache_salt=str(length),
    )
    outputs = [engine.step(Inbox(requests=[request]))]
    while engine.has_work:
        outputs.append(engine.step())
    assert outputs[-1].updates[-1].finish_reason is FinishReason.LENGTH, outputs[-1]

    sequences = [sequence for batch in batches for sequence in batch.sequences]
    ends = [seq.start + len(seq.token_ids) for seq in sequences]
    assert ends == [*range(CHUNK, length - 1, CHUNK), length - 1, length]  # every piece ends at a border
    (forward,) = forwards
    assert forward.positions.dtype == torch.int64
    assert forward.positions.tolist() == [length - 1]
    table = [page for seq in sequences if (new := seq.new_pages.get("global")) for page in new.pages]
    local = [page for seq in sequences if (new := seq.new_pages.get("local")) for page in new.pages]
    assert len(table) == len(local) == math.ceil(length / PAGE)
    wanted = by_definition(built, runner.memory, table, local, int(forward.token_ids), length)
    error = (hidden[-1][-1].double() - wanted).abs().max()
    assert wanted.std() > 0.1
    assert error < 1e-4


def by_definition(
    built: BuiltEngine, memory: KVMemory, table: list[int], local: list[int], token_id: int, length: int
) -> torch.Tensor:
    """Hidden state after the last norm of token length − 1, from keys and values as they lie in memory, its own among them: float64 [32]."""
    eps = built.model_config.rms_norm_eps
    weights = {name: parameter.double() for name, parameter in built.engine.runner.model.named_parameters()}
    position, begin = length - 1, (length - 1) // CHUNK * CHUNK

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up @ x).chunk(2)
        return down @ (gate * gate.sigmoid() * up)

    x = weights["embed.weight"][token_id]
    for layer in range(4):
        p, is_local = f"layers.{layer}.", layer != 3
        q = (weights[p + "attn.qkv.weight"] @ (rms(x) * weights[p + "attn_norm.weight"])).view(4, 8)[:2]
        q = rms(turned(q, position)) if is_local else q * (1 + 0.1 * math.log1p((position + 1) // 8192))
        pages, first = (local[begin // PAGE :], begin) if is_local else (table, 0)
        view = memory.view(layer)
        k, v = (t[torch.tensor(pages)].flatten(0, 1)[: length - first, 0].double() for t in (view.k, view.v))  # [n, 8]
        mixed = (q @ k.T / math.sqrt(8)).softmax(-1) @ v
        x = x + weights[p + "attn.o.weight"] @ mixed.flatten()
        y = rms(x) * weights[p + "mlp_norm.weight"]
        best, expert = (weights[p + "moe.router.weight"] @ y).max(0)
        gate_up, down = (weights[p + f"moe.experts.{n}"][expert].T for n in ("gate_up", "down"))
        shared = swiglu(y, weights[p + "moe.shared.gate_up.weight"], weights[p + "moe.shared.down.weight"])
        x = x + shared + swiglu(y * best.sigmoid(), gate_up, down)
    return rms(x) * weights["norm.weight"]


def turned(q: torch.Tensor, position: int) -> torch.Tensor:
    """Pairs turned by the angles of the position inside its chunk, which is all that scores inside the chunk can tell."""
    plain = 500_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    wavelength = 2 * math.pi / plain
    angle = position % CHUNK * torch.where(wavelength > 8192, plain / 16, plain)
    even, odd = q[..., 0::2], q[..., 1::2]
    return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1).flatten(-2)
