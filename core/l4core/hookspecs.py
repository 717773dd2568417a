"""The hooks, all of them. Each is called once at start-up, one plugin at a time, and returns small frozen records.

No hook is ever called inside a step. Order carries no meaning: names choose, and tiers rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from l4core.plugin_api import (
    PROJECT,
    AttentionBackendEntry,
    ChatTemplateEntry,
    DrafterEntry,
    ExpertKernelEntry,
    SamplerEntry,
)

hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec
def l4_attention_backends() -> Sequence[AttentionBackendEntry]:  # type: ignore[empty-body]
    """Attention backends this package offers."""


@hookspec
def l4_expert_kernels() -> Sequence[ExpertKernelEntry]:  # type: ignore[empty-body]
    """Kernels for the mixture of experts that this package offers."""


@hookspec
def l4_samplers() -> Sequence[SamplerEntry]:  # type: ignore[empty-body]
    """Logit transforms, chosen by `--sampler NAME` or a request's `sampler` field."""


@hookspec
def l4_chat_templates() -> Sequence[ChatTemplateEntry]:  # type: ignore[empty-body]
    """Chat templates, chosen by `--chat-template NAME`; an entry carries its own tool parser."""


@hookspec
def l4_drafters() -> Sequence[DrafterEntry]:  # type: ignore[empty-body]
    """Drafters for speculative decoding, chosen by `--speculative-algorithm NAME`."""
