"""A checkpoint's config.json, read once into a frozen, torch-free record. Nothing after this file asks what a missing key means.

Keys that give shapes must be there. Keys that give behaviour may be missing in early uploads and then take the values transformers gives
them (chunk 8192, temperature tuning on, every fourth layer without RoPE, QK norm on, RoPE base 500000).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4core.errors import CheckpointError
from l4core.kv.blocks import KVGroup

TEXT_ONLY = "Llama4ForCausalLM"
WITH_VISION = "Llama4ForConditionalGeneration"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """llama3 scaling: wavelengths beyond original_max_position_embeddings / low_freq_factor are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The text model. moe_layers, rope_layers, chunked_layers have one entry a layer.  intermediate_size: of an expert and of the shared
    expert; intermediate_size_mlp: of a dense layer.  attention_chunk_size, floor_scale: tokens.  dtype: torch's name of the stored weights.
    bos_token_id: None when the config names none."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_experts: int
    moe_layers: tuple[bool, ...]
    rope_layers: tuple[bool, ...]
    chunked_layers: tuple[bool, ...]
    use_qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_chunk_size: int | None
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    quantization_config: Mapping[str, Any] | None = None
    has_vision: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads config.json; the end-of-sequence ids of generation_config.json, where it names some, replace those of config.json.

        Raises CheckpointError for a missing, unreadable or unknown config.
        """
        raw = _read_json(folder / "config.json", required=True)
        found = _token_ids(_read_json(folder / "generation_config.json", required=False).get("eos_token_id"))
        return cls.from_dict(raw, eos_token_ids=found or None)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, eos_token_ids: tuple[int, ...] | None = None) -> ModelConfig:
        """raw: the whole config.json of either architecture. Raises CheckpointError naming the key, what was found and what was wanted."""
        architecture = _architecture(raw)
        text = raw if architecture == TEXT_ONLY else _need(raw, "text_config", Mapping, "text_config")
        return _parse(architecture, raw, _Keys(text, "" if text is raw else "text_config."), eos_token_ids)

    def kv_groups(self, *, hybrid: bool = True, num_draft_layers: int = 0) -> tuple[KVGroup, ...]:
        """Layers by what they remember: "global" keeps every token, "local" those of the current chunk. A group without layers is left out.

        hybrid: False = local pages are kept until the request ends (`--disable-hybrid-swa-memory`).
        num_draft_layers: of a draft with full attention and this model's KV heads. They are stored beside the global layers, in the same pages, with
        ids num_layers, num_layers + 1, …
        """
        local = tuple(i for i, chunked in enumerate(self.chunked_layers) if chunked)
        rest = tuple(i for i, chunked in enumerate(self.chunked_layers) if not chunked)
        rest += tuple(range(self.num_layers, self.num_layers + num_draft_layers))
        groups = (
            KVGroup(name="global", layer_ids=rest, chunk_size=None),
            KVGroup(name="local", layer_ids=local, chunk_size=self.attention_chunk_size, keep_all=not hybrid),
        )
        return tuple(group for group in groups if group.layer_ids)


class _Keys:
    """Typed access to one JSON object; every error names the key with its prefix."""

    def __init__(self, raw: Mapping[str, Any], prefix: str) -> None:
        self.raw, self.prefix = raw, prefix

    def fail(self, key: str, wanted: str, fix: str = "") -> CheckpointError:
        found = f"is {self.raw[key]!r}" if key in self.raw else "is missing"
        return CheckpointError(f"config.json: {self.prefix}{key} {found}; wanted {wanted}", fix=fix)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 1; missing or null = the default."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number > 0; missing or null = the default."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise self.fail(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true, false, or a whole number (early uploads write `4` for true); missing or null = the default."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, int):
            raise self.fail(key, "true or false")
        return bool(value)

    def list_of(self, key: str, kind: type) -> list[Any] | None:
        value = self.raw.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(x, kind) for x in value)):
            raise self.fail(key, f"a list of {kind.__name__} or null")
        return value


def _parse(
    architecture: str, raw: Mapping[str, Any], text: _Keys, eos_token_ids: tuple[int, ...] | None
) -> ModelConfig:
    _refuse_unknown_variants(text)
    num_layers, hidden_size, num_q_heads = (
        text.size("num_hidden_layers"),
        text.size("hidden_size"),
        text.size("num_attention_heads"),
    )
    num_kv_heads = text.size("num_key_value_heads", num_q_heads)
    if num_q_heads % num_kv_heads:
        raise text.fail("num_key_value_heads", f"a divisor of num_attention_heads ({num_q_heads})")
    head_dim = text.size("head_dim", hidden_size // num_q_heads)
    if head_dim % 2:
        raise text.fail("head_dim", "an even number (RoPE turns pairs)")
    chunk = None if text.raw.get("attention_chunk_size", 8192) is None else text.size("attention_chunk_size", 8192)
    rope_layers, moe_layers = _rope_layers(text, num_layers), _moe_layers(text, num_layers)
    theta, scaling = _rope(text)
    return ModelConfig(
        architecture=architecture,
        vocab_size=text.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.size("intermediate_size"),
        intermediate_size_mlp=text.size("intermediate_size_mlp", None if not all(moe_layers) else 16384),
        num_experts=text.size("num_local_experts"),
        moe_layers=moe_layers,
        rope_layers=rope_layers,
        chunked_layers=_chunked_layers(text, rope_layers, chunk),
        use_qk_norm=text.flag("use_qk_norm", True),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_chunk_size=chunk,
        attn_temperature_tuning=text.flag("attn_temperature_tuning", True),
        floor_scale=text.size("floor_scale", 8192),
        attn_scale=text.number("attn_scale", 0.1),
        max_position_embeddings=text.size("max_position_embeddings"),
        tie_word_embeddings=text.flag("tie_word_embeddings", _Keys(raw, "").flag("tie_word_embeddings", False)),
        bos_token_id=next(iter(_token_ids(text.raw.get("bos_token_id", raw.get("bos_token_id")))), None),
        eos_token_ids=eos_token_ids or _token_ids(text.raw.get("eos_token_id", raw.get("eos_token_id"))),
        dtype=_dtype(raw, text),
        quantization_config=raw.get("quantization_config") or text.raw.get("quantization_config"),
        has_vision=architecture == WITH_VISION and raw.get("vision_config") is not None,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    found = raw.get("architectures")
    name = found[0] if isinstance(found, list) and found else found
    if name not in (TEXT_ONLY, WITH_VISION):
        raise CheckpointError(
            f"config.json: architectures is {found!r}; wanted [{TEXT_ONLY!r}] or [{WITH_VISION!r}]",
            fix="L4 serves Llama 4 checkpoints in the Hugging Face layout only",
        )
    return str(name)


def _refuse_unknown_variants(text: _Keys) -> None:
    if text.size("num_experts_per_tok", 1) != 1:
        raise text.fail(
            "num_experts_per_tok",
            "1 (the router score scales an expert's input, which is one pass only when a token has one expert; no released Llama 4 has more)",
        )
    if text.raw.get("hidden_act", "silu") != "silu":
        raise text.fail("hidden_act", "'silu'")
    if text.flag("attention_bias", False):
        raise text.fail("attention_bias", "false (Llama 4 has no biases)")


def _rope_layers(text: _Keys, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` holds 1 for a layer WITH RoPE; [] and null mean "every no_rope_layer_interval-th layer has none"."""
    listed = text.list_of("no_rope_layers", int)
    if not listed:
        interval = text.size("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(listed) < num_layers or not set(listed) <= {0, 1}:
        raise text.fail("no_rope_layers", f"at least {num_layers} entries of 0 or 1, an empty list or null")
    return tuple(bool(x) for x in listed[:num_layers])


def _moe_layers(text: _Keys, num_layers: int) -> tuple[bool, ...]:
    """`moe_layers` lists layer indices; null = every interleave_moe_layer_step-th layer."""
    listed = text.list_of("moe_layers", int)
    step = text.size("interleave_moe_layer_step", 1)
    chosen = set(range(step - 1, num_layers, step) if listed is None else listed)
    return tuple(layer in chosen for layer in range(num_layers))


def _chunked_layers(text: _Keys, rope_layers: tuple[bool, ...], chunk: int | None) -> tuple[bool, ...]:
    """`layer_types` decides where it is given; else the RoPE layers are the chunked ones."""
    listed = text.list_of("layer_types", str)
    if listed is None:
        return tuple(rope and chunk is not None for rope in rope_layers)
    if len(listed) != len(rope_layers) or not set(listed) <= {"chunked_attention", "full_attention"}:
        raise text.fail(
            "layer_types", f"{len(rope_layers)} entries of 'chunked_attention' or 'full_attention', or null"
        )
    if "chunked_attention" in listed and chunk is None:
        raise text.fail("attention_chunk_size", "a number of tokens, since layer_types has 'chunked_attention'")
    return tuple(kind == "chunked_attention" for kind in listed)


def _rope(text: _Keys) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before). Of both the older one counts, as in
    transformers: it was written into a newer file by hand."""
    key = "rope_scaling" if text.raw.get("rope_scaling") else "rope_parameters"
    raw = text.raw.get(key)
    if raw is None:
        return text.number("rope_theta", 500000.0), None
    if not isinstance(raw, Mapping):
        raise text.fail(key, "an object or null")
    rope = _Keys(raw, f"{text.prefix}{key}.")
    theta = rope.number("rope_theta", text.number("rope_theta", 500000.0))
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.fail("rope_type" if "rope_type" in raw else "type", "'llama3' or 'default'")
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )


def _dtype(raw: Mapping[str, Any], text: _Keys) -> str:
    """`dtype` (transformers 5) or `torch_dtype`, at the top or in the text half; none at all = float32, as transformers reads it."""
    for keys in (text.raw, raw):
        for key in ("dtype", "torch_dtype"):
            if keys.get(key) is not None:
                return str(keys[key]).removeprefix("torch.")
    return "float32"


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in ids):
        raise CheckpointError(f"config: token id is {value!r}; wanted a whole number, a list of them or null")
    return tuple(ids)


def _need(raw: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    if not isinstance(raw.get(key), kind):
        raise CheckpointError(f"config.json: {name} is {raw.get(key)!r}; wanted an object")
    return raw[key]


def _read_json(path: Path, *, required: bool) -> Mapping[str, Any]:
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} does not exist; wanted a checkpoint folder with config.json")
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; wanted an object")
    return raw
