"""Folders appear whole or not at all; config.json is a Llama 4; the draft is joined; what is missing is named. (`make demo` builds the real one.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l4core.cli.demo_model import demo_model
from l4core.demo.arch import LAYERS, STUDENT, VOCAB
from l4core.demo.base import BaseModel
from l4core.demo.build import CHECKOUT, build_draft, build_target, cached_folder, find_delta, new_folder
from l4core.demo.draft import narrowed, restored, store_draft, write_draft
from l4core.demo.folder import config, generation_config
from l4core.engine.generation_defaults import read_defaults
from l4core.errors import CheckpointError


def silent(line: str) -> None:
    pass


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as scratch:
        (scratch / "a").write_text("a", encoding="utf-8")
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (out / "a").read_text(encoding="utf-8") == "a"
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"), new_folder(tmp_path):
        pass


def test_a_taken_name_is_told_before_anything_is_fetched_or_read(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(CheckpointError, match="already exists"):
        build_target(tmp_path, tmp_path / "no-delta", base=None, dtype=torch.float32, say=said.append)
    taken = tmp_path / "draft"
    taken.mkdir()
    with pytest.raises(CheckpointError, match="draft already exists"):
        demo_model.main([str(tmp_path / "new"), "--draft-out", str(taken)], standalone_mode=False)
    assert not (tmp_path / "new").exists()
    assert said == []


def test_the_checkout_has_the_delta() -> None:
    assert find_delta() == CHECKOUT


def test_a_folder_without_the_delta(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no delta-experts") as caught:
        find_delta(tmp_path)
    assert "--delta CLONE/checkpoints/smol-l4" in caught.value.fix


def test_the_cached_name_follows_the_delta(tmp_path: Path) -> None:
    for name, text in (("delta-experts.safetensors", b"a"), ("delta-rest.safetensors", b"b")):
        (tmp_path / name).write_bytes(text)
    before = cached_folder(tmp_path)
    assert cached_folder(tmp_path) == before
    (tmp_path / "delta-rest.safetensors").write_bytes(b"c")
    assert cached_folder(tmp_path) != before


def test_answers_are_drawn_as_llama_4s_own_files_have_it(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config()))
    assert read_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}


def test_a_base_that_is_no_gguf(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"no GGUF at all, only some text that is long enough")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        build_target(tmp_path / "out", CHECKOUT, base=base, dtype=torch.float32, say=silent)
    assert not (tmp_path / "out").exists()


def test_config_is_a_whole_llama4() -> None:
    made = config(STUDENT, "bfloat16")
    assert made["architectures"] == ["Llama4ForCausalLM"]
    assert made["no_rope_layers"] == [0 if i % 4 == 3 else 1 for i in range(LAYERS)]
    assert made["layer_types"][2:4] == ["chunked_attention", "full_attention"]
    assert made["moe_layers"] == list(range(LAYERS))
    assert (made["attention_chunk_size"], made["vocab_size"], made["attn_temperature_tuning"]) == (512, VOCAB, True)


def test_config_reads_back_in_transformers() -> None:
    from transformers import Llama4TextConfig

    made = config(STUDENT, "bfloat16")
    read = Llama4TextConfig(**made)
    for name in ("no_rope_layers", "layer_types", "moe_layers", "attention_chunk_size", "eos_token_id", "floor_scale"):
        assert getattr(read, name) == made[name]


def test_draft(tmp_path: Path) -> None:
    build_draft(tmp_path / "draft", CHECKOUT, say=silent)
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    made = json.loads((tmp_path / "draft" / "config.json").read_text(encoding="utf-8"))
    assert made["architectures"] == ["LlamaForCausalLMEagle3"]
    assert tensors["lm_head.weight"].shape == (made["draft_vocab_size"], made["hidden_size"])
    target_ids = tensors["d2t"] + torch.arange(made["draft_vocab_size"])
    assert torch.equal(tensors["t2d"].nonzero().flatten(), target_ids)


def test_a_stored_draft_is_the_draft(tmp_path: Path) -> None:
    """Matrices within half a step of 1/127 of their row's largest weight (and bfloat16), all else to the bit; stored again it stays what it is."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(torch.bfloat16)

    made = {"fc.weight": some(4, 12), "lm_head.weight": some(9, 4), "midlayer.mlp.up_proj.weight": some(6, 4)}
    made["lm_head.weight"][2] = 0
    made |= {"norm.weight": some(4), "d2t": torch.arange(9), "t2d": torch.arange(20) % 2 == 0}
    store_draft(made, "{}", tmp_path)
    (tmp_path / "out").mkdir()
    write_draft(tmp_path, tmp_path / "out")
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == made.keys()
    for name, tensor in made.items():
        assert read[name].dtype == tensor.dtype
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            largest = tensor.float().abs().amax(1, keepdim=True)
            assert ((read[name].float() - tensor.float()).abs() <= largest * (0.5 / 127 + 2**-7)).all()
        else:
            assert torch.equal(read[name], tensor)
    again = restored(narrowed(read))
    assert all((again[name].float() - read[name].float()).abs().max() < 0.03 for name in made)


def test_a_delta_without_a_draft(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no draft-head\.safetensors"):
        build_draft(tmp_path / "draft", tmp_path, say=silent)
    assert not (tmp_path / "draft").exists()


def test_a_tensor_the_base_lacks(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "empty.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = BaseModel(path)
    assert torch.equal(base.embed(), torch.ones(4, 32))
    with pytest.raises(CheckpointError, match=r"no tensor 'output_norm\.weight'"):
        base.norm()
    with pytest.raises(CheckpointError, match="no tokenizer field 'tokens'"):
        base.vocabulary()
