"""How large an EAGLE3 draft is, from its config.json alone: both formats in use (facts of its layer: one layer, input twice as wide). Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from l4core.errors import CheckpointError, ConfigError
from l4core.model.config import ModelConfig

ITEM_BYTES = 2
OFFSET_BYTES = 8
"""Of one draft token's offset to its id in the target's vocabulary."""


def read_draft(folder: Path) -> Mapping[str, object]:
    """A draft's config.json. Raises CheckpointError when there is none."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; wanted the config of a draft checkpoint") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; wanted an object")
    return raw


def draft_weight_bytes(raw: Mapping[str, object], target: ModelConfig, tp: int) -> int:
    """Bytes of one rank's share in bfloat16; every matrix is cut. The embedding is the target's, and so is a head of the whole vocabulary that the
    draft leaves out. Raises ConfigError for a draft whose KV does not fit beside the target's."""
    inner = raw.get("transformer_layer_config", raw)
    assert isinstance(inner, Mapping)
    hidden = _size(inner, "hidden_size")
    wide = "intermediate_size_mlp" if inner.get("model_type") == "llama4_text" else "intermediate_size"
    heads, kv_heads = _size(inner, "num_attention_heads"), _size(inner, "num_key_value_heads")
    head = _size(inner, "head_dim", hidden // heads)
    if (kv_heads, head) != (target.num_kv_heads, target.head_dim):
        raise ConfigError(
            f"the draft has {kv_heads} KV heads of {head}, the model {target.num_kv_heads} of {target.head_dim}; its KV lies beside the model's",
            fix="a draft made for this model",
        )
    vocab = _size(raw, "draft_vocab_size", target.vocab_size)
    local_kv = max(kv_heads, tp)  # fewer KV heads than ranks are copied
    elements = 3 * target.hidden_size * hidden  # fc
    elements += 2 * hidden * head * (heads + 2 * local_kv) + heads * head * hidden
    elements += 3 * hidden * _size(inner, wide) + vocab * hidden
    return elements * ITEM_BYTES // tp + 4 * hidden * ITEM_BYTES + vocab * OFFSET_BYTES


def _size(raw: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"the draft's config.json: {key} is {value!r}; wanted a whole number of at least 1")
    return value
