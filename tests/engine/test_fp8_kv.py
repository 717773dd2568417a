"""`--kv-cache-dtype`: what is stored is rounded once, by core; answers are those of attention over the rounded values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.profile import DEVICE
from helpers.recording import Recorder, greedy
from l4core import LLM
from l4core.errors import ConfigError
from l4core.kv.dtypes import kv_dtype_name, stored_scale
from l4core.plugin_api import AttentionBackend, AttentionMetadata, KVView

PROMPT = [(7 * i) % 250 for i in range(100)]


def open_llm(folder: Path, **options: Any) -> LLM:
    options = {"max_total_tokens": 512, "page_size": 16, "disable_cuda_graph": True, **options}
    return LLM(folder.as_posix(), dtype="float32", device=DEVICE, progress=False, **options)


def logits_of(llm: LLM) -> torch.Tensor:
    recorder = Recorder(llm)
    llm.generate([PROMPT], greedy(40))
    return recorder.stacked(0)


def test_gfx942_stores_its_own_formats() -> None:
    assert kv_dtype_name("auto", "bfloat16", "gfx942") == "bfloat16"
    assert [kv_dtype_name(x, "bfloat16", "sm90") for x in ("fp8", "fp8_e4m3", "fp8_e5m2", "float16")] == [
        "float8_e4m3fn",
        "float8_e4m3fn",
        "float8_e5m2",
        "float16",
    ]
    assert [kv_dtype_name(x, "bfloat16", "gfx942") for x in ("fp8", "fp8_e5m2", "float16")] == [
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float16",
    ]
    assert kv_dtype_name("fp8", "bfloat16", "gfx950") == "float8_e4m3fn"
    assert (stored_scale(0.5, "float8_e4m3fn"), stored_scale(0.5, "float8_e4m3fnuz")) == (0.5, 1.0)


class Rounding(AttentionBackend):
    """Attention over float32 KV, rounded to `dtype` as it is read: what memory of that dtype must be equal to."""

    def __init__(self, inner: AttentionBackend, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype

    def plan(self, meta: AttentionMetadata) -> object:
        return self.inner.plan(meta)

    def attend(self, q: torch.Tensor, kv: KVView, plan: object, out: torch.Tensor) -> None:
        largest = torch.finfo(self.dtype).max
        k, v = (x.clamp(-largest, largest).to(self.dtype).float() for x in (kv.k, kv.v))
        self.inner.attend(q, KVView(k=k, v=v), plan, out)


@pytest.mark.parametrize(
    ("option", "dtype", "backend"),
    [
        ("fp8", torch.float8_e4m3fn, "sdpa"),
        ("fp8", torch.float8_e4m3fn, "reference"),
        ("fp8_e5m2", torch.float8_e5m2, "sdpa"),
        ("bfloat16", torch.bfloat16, "sdpa"),
        *([("fp8", torch.float8_e4m3fn, "triton")] if DEVICE != "cpu" else []),
    ],
)
def test_the_engine_attends_over_what_is_stored(tiny: Path, option: str, dtype: torch.dtype, backend: str) -> None:
    """Prefill and decode over a border, logits beside attention that rounds float32 KV itself, on one tiny model in float32."""
    mine = open_llm(tiny, kv_cache_dtype=option, attention_backend=backend)
    memory = mine._built.engine.runner.memory
    assert memory.dtype == dtype
    plain = open_llm(tiny)
    theirs = open_llm(tiny, attention_backend=backend)
    theirs._built.engine.runner.backend = Rounding(theirs._built.engine.runner.backend, dtype)
    found, wanted, exact = logits_of(mine), logits_of(theirs), logits_of(plain)
    assert (found - wanted).abs().max() < 2e-4
    assert (found - exact).abs().max() > 10 * (found - wanted).abs().max(), "nothing was rounded"


def with_scales(plain: Path, folder: Path) -> Path:
    """The same checkpoint, with KV scales for layer 0 stored beside its weights."""
    shutil.copytree(plain, folder)
    save_file(
        {
            "model.layers.0.self_attn.k_scale": torch.tensor(0.001),
            "model.layers.0.self_attn.v_scale": torch.tensor([0.002]),
        },
        folder / "kv_scales.safetensors",
    )
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        index = json.loads(index_path.read_text())
    else:
        (weights,) = (p for p in folder.glob("*.safetensors") if p.name != "kv_scales.safetensors")
        with safe_open(weights, "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), weights.name)}
    index["weight_map"] |= {f"model.layers.0.self_attn.{x}_scale": "kv_scales.safetensors" for x in "kv"}
    index_path.write_text(json.dumps(index))
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_scales_of_a_checkpoint_are_used(tiny: Path, tmp_path: Path) -> None:
    """Scales of a thousandth: what is larger than 0.448 saturates."""
    folder = with_scales(tiny, tmp_path / "scaled")
    mine = open_llm(folder, kv_cache_dtype="fp8")
    memory = mine._built.engine.runner.memory
    k_scale, v_scale = memory.view(0).k_scale, memory.view(0).v_scale
    assert k_scale is not None
    assert v_scale is not None
    assert (k_scale.item(), v_scale.item()) == pytest.approx((0.001, 0.002))
    assert memory.view(1).k_scale is None
    assert any("scales of 1 layers from the checkpoint" in line for line in mine._built.report)
    found = logits_of(mine)
    k = memory.pages(0)[:, 0].float().nan_to_num() * 0.001
    assert k.abs().max().item() == pytest.approx(0.448), "layer 0 stores k divided by its scale"
    assert (found - logits_of(open_llm(tiny, kv_cache_dtype="fp8"))).abs().max() > 1e-2
    assert torch.equal(logits_of(open_llm(folder)), logits_of(open_llm(tiny))), "float32 KV takes no scale"


def test_memory_holds_four_times_the_tokens(tiny: Path) -> None:
    """Counted by the planner: one byte instead of float32's four."""
    options = {"mem_fraction_static": 0.01, "max_running_requests": 256}
    fp8, plain = (open_llm(tiny, kv_cache_dtype=x, **options)._built.engine.runner.memory for x in ("fp8", "auto"))
    assert fp8.num_bytes / len(fp8.pages(3)) * 4 == plain.num_bytes / len(plain.pages(3))


def test_an_unknown_name(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8_e3m4'; wanted one of"):
        open_llm(tiny, kv_cache_dtype="fp8_e3m4")
