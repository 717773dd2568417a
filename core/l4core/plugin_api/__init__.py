"""Everything a plugin imports: `hookimpl`, frozen records, verdicts, base classes and `PLUGIN_API`.

    from l4core.plugin_api import AttentionBackend, AttentionBackendEntry, hookimpl

Import from here; one file for each kind of plugin is where to read: attention, experts, sampling, chat, drafting.

Importing this package imports neither torch nor numpy (a test checks it). Records are frozen; a new field always has a default, so a
plugin written for API N keeps working on a core that serves N and N+1.
"""

from __future__ import annotations

from l4core.errors import BackendUnavailable
from l4core.platform import Platform
from l4core.plugin_api.attention import (
    AttentionBackend,
    AttentionBackendEntry,
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    ChunkInfo,
    KVView,
    Plan,
    TreeMask,
    Usable,
)
from l4core.plugin_api.chat import (
    ChatTemplate,
    ChatTemplateEntry,
    Image,
    Piece,
    Special,
    Text,
    ToolCallDelta,
    ToolParser,
)
from l4core.plugin_api.contract import PLUGIN_API, PROJECT, hookimpl
from l4core.plugin_api.drafting import DraftContext, Drafter, DrafterEntry, DraftRow
from l4core.plugin_api.experts import (
    ExpertContext,
    ExpertKernel,
    ExpertKernelEntry,
    ExpertRequirements,
    ExpertsUsable,
    ExpertVerdict,
    ExpertWeights,
)
from l4core.plugin_api.sampling import Sampler, SamplerEntry, SamplerRow
from l4core.plugin_api.verdict import Tier, Unusable
from l4core.request import SamplingParams

__all__ = [
    "PLUGIN_API",
    "PROJECT",
    "AttentionBackend",
    "AttentionBackendEntry",
    "AttentionContext",
    "AttentionMetadata",
    "AttentionRequirements",
    "BackendUnavailable",
    "ChatTemplate",
    "ChatTemplateEntry",
    "ChunkInfo",
    "DraftContext",
    "DraftRow",
    "Drafter",
    "DrafterEntry",
    "ExpertContext",
    "ExpertKernel",
    "ExpertKernelEntry",
    "ExpertRequirements",
    "ExpertVerdict",
    "ExpertWeights",
    "ExpertsUsable",
    "Image",
    "KVView",
    "Piece",
    "Plan",
    "Platform",
    "Sampler",
    "SamplerEntry",
    "SamplerRow",
    "SamplingParams",
    "Special",
    "Text",
    "Tier",
    "ToolCallDelta",
    "ToolParser",
    "TreeMask",
    "Unusable",
    "Usable",
    "hookimpl",
]
