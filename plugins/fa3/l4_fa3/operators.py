"""The operators of whichever library carries FlashAttention-3, bound by their own schema.

Three builds are in use and their operators differ by a few arguments, so nothing is assumed: an argument is passed where the schema has it, and one
that this plugin does not know must have a default or a neutral value here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from l4_fa3.probe import install, providers_for
from l4core.plugin_api import BackendUnavailable

NAMESPACES: Mapping[str, tuple[str, str]] = {
    "flash_attn_interface": ("flash_attn_interface", "flash_attn_3"),
    "sgl_kernel": ("sgl_kernel.flash_attn", "sgl_kernel"),
    "vllm": ("vllm.vllm_flash_attn._vllm_fa3_C", "_vllm_fa3_C"),
}
"""Provider → the module whose import registers the operators, and their namespace in torch.ops."""

NEUTRAL: Mapping[str, object] = {
    "is_causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "has_softcap": False,
    "is_rotary_interleaved": False,
    "num_splits": 0,
    "sm_margin": 0,
    "max_seqlen_k_new": 0,
    "only_qv": False,
    "cp_world_size": 1,
    "cp_rank": 0,
}
"""Values that switch an argument off. Optional arguments are None."""

NEEDED = frozenset(
    {"q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "max_seqlen_q", "page_table", "softmax_scale", "is_causal"}
    | {"q_descale", "k_descale", "v_descale", "num_splits"}
)
"""What `fwd` must take for this plugin to be right; a build without one of them is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator and where each of its arguments stands. neutral: a full list of values that ask for nothing."""

    call: Any
    places: Mapping[str, int]
    neutral: tuple[object, ...]

    def __contains__(self, argument: str) -> bool:
        return argument in self.places

    def arguments(self, **given: object) -> list[object]:
        """A full argument list. KeyError when the operator has no argument of a given name."""
        values = list(self.neutral)
        for name, value in given.items():
            values[self.places[name]] = value
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """provider: its name as in the option.  metadata: None where the build cannot prepare the schedule ahead of the call."""

    provider: str
    fwd: Operator
    metadata: Operator | None


def find_library(named: str | None, arch: str) -> Library:
    """The first library that is built for `arch`, imports and has fitting operators, or the named one. BackendUnavailable lists what each lacked."""
    names = [provider.module for provider in providers_for(arch)]
    if named is not None and named not in names:
        raise BackendUnavailable(
            f"provider is {named!r}; wanted on {arch} one of {', '.join(names)}",
            fix=f"--attention-option provider={names[0]}",
        )
    refusals = []
    for name in names if named is None else [named]:
        try:
            return load(name)
        except (ImportError, OSError, AttributeError, BackendUnavailable) as error:
            refusals.append(f"{name}: {error}")
    raise BackendUnavailable("no build of FlashAttention-3 works here: " + "; ".join(refusals), fix=install(arch))


def load(provider: str) -> Library:
    """ImportError, OSError (a library it needs) or AttributeError (no such operator) come through; BackendUnavailable for a schema that differs."""
    module, namespace = NAMESPACES[provider]
    importlib.import_module(module)
    operators = getattr(torch.ops, namespace)
    fwd = bind(operators.fwd.default._schema, operators.fwd.default)
    missing = sorted(NEEDED - set(fwd.places))
    if missing:
        raise BackendUnavailable(f"its operator {namespace}::fwd has no argument {', '.join(missing)}")
    try:
        prepare = operators.get_scheduler_metadata.default
    except AttributeError:
        return Library(provider=provider, fwd=fwd, metadata=None)
    metadata = bind(prepare._schema, prepare) if "scheduler_metadata" in fwd else None
    return Library(provider=provider, fwd=fwd, metadata=metadata)


def bind(schema: torch.FunctionSchema, call: Any) -> Operator:
    """Places and neutral values from a schema. BackendUnavailable names an argument nobody can fill."""
    places, neutral = {}, []
    for place, argument in enumerate(schema.arguments):
        places[argument.name] = place
        neutral.append(_neutral(schema, argument))
    return Operator(call=call, places=places, neutral=tuple(neutral))


REQUIRED = frozenset(
    {"q", "k", "v", "softmax_scale", "seqused_k", "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads"}
    | {"num_heads_k", "headdim", "headdim_v", "qkv_dtype"}
)
"""Arguments that this plugin always gives."""


def _neutral(schema: torch.FunctionSchema, argument: Any) -> object:
    if argument.has_default_value():
        return argument.default_value
    if argument.name in NEUTRAL:
        return NEUTRAL[argument.name]
    if isinstance(argument.type, torch.OptionalType) or argument.name in REQUIRED:
        return None
    raise BackendUnavailable(
        f"its operator {schema.name} wants {argument.name} ({argument.type}), which this version of l4-fa3 does not know",
        fix="pip install --upgrade l4-fa3",
    )
