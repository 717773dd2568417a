"""What an EAGLE3 draft's config.json says, in either of its two formats, and what each format means by what it leaves out.

    format        written by                     layer ids mean
    eagle         EAGLE, SGLang/SpecForge, NVIDIA   the output of layer i
    speculators   RedHat / vLLM                     the input of layer i, as vLLM serves it: the output of layer i − 1

Without ids both mean the outputs of layers 1, n/2 − 1 and n − 4 of a target of n layers. Ids are kept here as "output of layer i, from 0" whatever
the format said, the start-up block shows them, and `--speculative-option aux_layers=1,23,44` overrides them (a draft converted from one format to
the other may carry the other's ids).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from l4core.errors import CheckpointError
from l4core.model.config import RopeScaling

Format: TypeAlias = Literal["eagle", "speculators"]
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3Speculator", "Eagle3DraftModel", "LlamaForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """One draft layer. aux_layers: ids of target layers whose outputs it reads.  target_hidden_size: of each of them.
    draft_vocab_size: rows of its head.  vocab_size: of the target.  longest_context: tokens of a sequence up to which it is asked to guess.
    norm_before_fc: one RMS norm over all aux outputs together; fc_norm: one each.  norm_before_residual: the residual is the normed hidden state.
    norm_output: the recursion is fed with the final norm's output."""

    format: Format
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    vocab_size: int
    draft_vocab_size: int
    longest_context: int
    aux_layers: tuple[int, ...]
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool

    @classmethod
    def from_folder(cls, folder: Path, *, target: Target, options: Mapping[str, str]) -> DraftConfig:
        """Reads config.json. options: `--speculative-option` values that override it. CheckpointError for a draft of another kind, or a missing
        key that two readers take differently."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", fix="give the folder of an EAGLE3 draft"
            ) from error
        return cls.from_dict(raw, target=target, options=options)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, target: Target, options: Mapping[str, str]) -> DraftConfig:
        """As `from_folder`."""
        found: Format = "speculators" if "speculators_model_type" in raw else "eagle"
        _check_kind(raw, found)
        layer = _mapping(raw, "transformer_layer_config") if found == "speculators" else raw
        flags = raw if found == "speculators" else {**raw, **(raw.get("eagle_config") or {})}
        if int(layer.get("num_hidden_layers") or 1) != 1:
            raise CheckpointError(f"the draft has {layer['num_hidden_layers']} layers; an EAGLE3 draft has one")
        hidden, heads = _size(layer, "hidden_size"), _size(layer, "num_attention_heads")
        width = "intermediate_size_mlp" if layer.get("model_type") == "llama4_text" else "intermediate_size"
        rope = layer.get("rope_parameters") or {}
        return cls(
            format=found,
            hidden_size=hidden,
            target_hidden_size=int(raw.get("target_hidden_size") or target.hidden_size),
            intermediate_size=_size(layer, width),
            num_q_heads=heads,
            num_kv_heads=int(layer.get("num_key_value_heads") or heads),
            head_dim=int(layer.get("head_dim") or hidden // heads),
            rms_norm_eps=float(layer.get("rms_norm_eps") or 1e-6),
            rope_theta=float(layer.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_scaling(layer.get("rope_scaling") or rope),
            vocab_size=target.vocab_size,
            draft_vocab_size=int(raw.get("draft_vocab_size") or target.vocab_size),
            longest_context=_longest_context(options),
            aux_layers=_aux_layers(flags, found, target, options),
            norm_before_residual=_norm_before_residual(flags, found, options),
            norm_before_fc=bool(flags.get("norm_before_fc")),
            fc_norm=bool(flags.get("fc_norm")),
            norm_output=bool(flags.get("norm_output")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a draft must fit."""

    num_layers: int
    hidden_size: int
    vocab_size: int


LONGEST_CONTEXT = 16384
"""Where a draft of full attention, trained on 2,048 to 4,096 tokens, was seen to be of no use any more: 1.09 tokens a step (speculators#684)."""
OPTIONS: Mapping[str, str] = {
    "aux_layers": "ids of the target layers whose outputs the draft reads, counted from 0, such as 1,23,44 (default: its config's)",
    "norm_before_residual": "true or false, where a draft in the speculators format does not say",
    "longest_context": f"tokens of a sequence up to which the draft guesses (default {LONGEST_CONTEXT}): far beyond its training it is wrong",
}
"""`--speculative-option` names of EAGLE3."""


def _check_kind(raw: Mapping[str, Any], found: Format) -> None:
    kind = raw.get("speculators_model_type") if found == "speculators" else (raw.get("architectures") or ["none"])[0]
    if (found == "speculators" and kind != "eagle3") or (found == "eagle" and kind not in ARCHITECTURES):
        raise CheckpointError(
            f"the draft's config.json describes {kind!r}; wanted an EAGLE3 draft (architectures {ARCHITECTURES[0]}, or speculators_model_type eagle3)"
        )


def _aux_layers(flags: Mapping[str, Any], found: Format, target: Target, options: Mapping[str, str]) -> tuple[int, ...]:
    ids = flags.get("eagle_aux_hidden_state_layer_ids")
    if "aux_layers" in options:
        try:
            layers = tuple(int(part) for part in options["aux_layers"].split(","))
        except ValueError as error:
            raise CheckpointError(
                f"--speculative-option aux_layers is {options['aux_layers']!r}; wanted layer ids such as 1,23,44"
            ) from error
    elif not ids:
        layers = (1, target.num_layers // 2 - 1, target.num_layers - 4)
    else:
        layers = tuple(int(i) - (found == "speculators") for i in ids)
    if not all(0 <= layer < target.num_layers for layer in layers) or list(layers) != sorted(set(layers)):
        raise CheckpointError(
            f"the draft reads the outputs of layers {list(layers)}; the target has layers 0 to {target.num_layers - 1}, wanted ascending ids",
            fix="--speculative-option aux_layers=I,J,K names them as outputs of layer i, counted from 0",
        )
    return layers


def _longest_context(options: Mapping[str, str]) -> int:
    given = options.get("longest_context", str(LONGEST_CONTEXT))
    if not given.isdecimal() or int(given) < 1:
        raise CheckpointError(f"--speculative-option longest_context is {given!r}; wanted a number of tokens")
    return int(given)


def _norm_before_residual(flags: Mapping[str, Any], found: Format, options: Mapping[str, str]) -> bool:
    """In the eagle format its absence means no, to every reader. In the speculators format its own readers disagree."""
    if "norm_before_residual" in options:
        given = options["norm_before_residual"]
        if given not in ("true", "false"):
            raise CheckpointError(f"--speculative-option norm_before_residual is {given!r}; wanted true or false")
        return given == "true"
    value = flags.get("norm_before_residual")
    if value is None and found == "speculators":
        raise CheckpointError(
            "the draft's config.json has no norm_before_residual; readers of this format disagree on what that means",
            fix="--speculative-option norm_before_residual=true (what speculators trains by default), or =false; the wrong one gives low acceptance",
        )
    return bool(value)


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the draft's config.json: {key} is {value!r}; wanted an object")
    return value


def _size(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"the draft's config.json: {key} is {value!r}; wanted a whole number of at least 1")
    return value


def _scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"the draft's rope_scaling is {kind!r}; wanted none, default or llama3")
    return RopeScaling(
        factor=float(raw["factor"]),
        low_freq_factor=float(raw["low_freq_factor"]),
        high_freq_factor=float(raw["high_freq_factor"]),
        original_max_position_embeddings=int(raw["original_max_position_embeddings"]),
    )
