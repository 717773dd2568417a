"""Everything a plugin imports: `hookimpl`, frozen records, verdicts, base classes and `PLUGIN_API`.

Importing this file imports neither torch nor numpy (a test checks it). Records are frozen; a new field always has a default, so a
plugin written for API N keeps working on a core that serves N and N+1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, TypeAlias

import pluggy

from l4core.errors import BackendUnavailable
from l4core.platform import Platform
from l4core.request import SamplingParams

if TYPE_CHECKING:
    import logging

    import torch

PLUGIN_API = 1
"""The contract's version. Core serves PLUGIN_API and PLUGIN_API − 1; an entry states the one it was written for in `api`."""

PROJECT = "l4core"
"""pluggy's project name and the entry-point group."""

hookimpl = pluggy.HookimplMarker(PROJECT)

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

# ---------------------------------------------------------------- attention: selection


class Tier(IntEnum):
    """How good a backend is on a platform. The highest usable tier wins, then the name; a tie is logged."""

    REFERENCE = 0  # right, slow, never chosen while anything else is usable
    PORTABLE = 10  # right everywhere, no tuning for this hardware
    TUNED = 20  # kernels tuned for this family of devices
    NATIVE = 30  # the vendor's own kernels on the hardware they are made for


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRequirements:
    """What this model, on this rank, under these flags, needs. dtypes are torch's names ("bfloat16", "float8_e4m3fn").

    num_q_heads, num_kv_heads: per rank.  page_size: tokens, None = the backend may choose.  chunk_size: tokens, None when no layer is
    chunked.  max_num_seqs: rows of a block table after splitting into virtual batches.  max_num_tokens: query tokens of one step.
    num_draft_tokens: verified per sequence and step (0 = no speculation).
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: str
    kv_dtype: str
    page_size: int | None = None
    chunk_size: int | None = None
    max_num_seqs: int = 1
    max_num_tokens: int = 1
    num_draft_tokens: int = 0
    needs_tree: bool = False
    needs_graph: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """Verdict: the backend can do all that was required. page_sizes: None = any.  page_stride: "free" = the distance between pages may be
    anything; "dense" = pages must lie back to back.  native_chunk: wants `AttentionMetadata.chunk` instead of virtual batches.
    tree_mask: honours `AttentionMetadata.tree`.  empty_rows: takes decode rows without keys and virtual batches without queries.
    workspace_bytes: device memory it holds for life, plus the most a plan and one attend take beside q and out.
    named_only: never chosen by itself, whatever its tier; `note` says why.
    finite_tail: multiplies what lies past a sequence's last key in its last page by zero, so that must be finite; others never let it count."""

    tier: Tier
    page_sizes: tuple[int, ...] | None = None
    preferred_page_size: int = 64
    page_stride: Literal["free", "dense"] = "free"
    graph: bool = False
    tree_mask: bool = False
    native_chunk: bool = False
    empty_rows: bool = True
    workspace_bytes: int = 0
    named_only: bool = False
    finite_tail: bool = False
    provider: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Verdict: it cannot, and why. reason: what was found and what was wanted.  fix: a command or flag, may be empty."""

    reason: str
    fix: str = ""


Verdict: TypeAlias = Usable | Unusable


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackendEntry:
    """What `l4_attention_backends` returns. probe: pure function of plain data (no torch import, opens no device).
    create: "package.module:function", imported only when chosen; called with an AttentionContext; returns an AttentionBackend or
    raises BackendUnavailable.  options: names that `--attention-option` may set, with one line of help each."""

    name: str
    api: int
    probe: Callable[[Platform, AttentionRequirements], Verdict]
    create: str
    options: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- attention: running


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionContext:
    """Handed to `create`. device: torch device string.  options: what the user set with `--attention-option key=value`."""

    requirements: AttentionRequirements
    platform: Platform
    device: str
    page_size: int
    options: Mapping[str, str]
    logger: logging.Logger


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInfo:
    """Only for backends with `native_chunk`: token at absolute position p attends to [p // size * size, p]. `seq_lens` then count from the
    sequence's start, and the block table is a ring: the page of page index i (= position // page_size) is in column i % width. A full table
    is the ring that never wraps; pages of earlier chunks may be gone from either."""

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMask:
    """Tree verification: a sequence's last q_len slots hold its nodes (at most 64), its earlier ones the prefix. Node row i sees the prefix and
    the nodes whose bit is set in ancestors[i] (bit j = j-th node of its sequence; its own bit is set). Replaces causal masking.

    ancestors: int64 [num_tokens].  sees_prefix: bool [num_tokens], None = all do; in a chunked layer the nodes past a border see no prefix.
    In chunked layers core has cut table, lengths and bitmaps to the chunk: `chunk` is None beside a tree, for every backend.
    """

    ancestors: torch.Tensor
    sees_prefix: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """One batch of one phase for one KV group, as a backend sees it. Tensors are int32 on the device; B = num_seqs rows.

    cu_seqlens_q [B+1]: query rows of sequence b are [cu[b], cu[b+1]).  seq_lens [B]: keys of sequence b, its new tokens included (already
    written).  block_table [B, W]: page of key j is block_table[b, j // page_size].  Masking is causal, bottom-right aligned: query row i of n
    sees keys 0 … seq_len − n + i.  max_seqlen_q, max_seqlen_k: host bounds (static under graphs).  phase: "decode" = one query row per
    sequence (a row may be empty: seq_len 0), "prefill" = any, "verify" = at most num_draft_tokens+1 rows each.
    """

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_seqs: int
    phase: Literal["decode", "prefill", "verify"]
    tree: TreeMask | None = None
    chunk: ChunkInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVView:
    """One layer's keys and values. k, v: [num_pages, page_size, num_kv_heads, head_dim], last stride 1, page stride free (or dense if asked).
    k_scale, v_scale: float32 scalars that multiply stored fp8 values, None = 1."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


Plan: TypeAlias = object
"""Whatever a backend's `plan` returns; core only hands it back to `attend`."""


class AttentionBackend(ABC):
    """Attention over paged KV. Reads KV only; core alone writes it. Knows nothing of chunks unless it declared `native_chunk`.

    `scale` of the scores is head_dim ** −0.5. Two live backends in one process must not share state.
    """

    @abstractmethod
    def plan(self, meta: AttentionMetadata) -> Plan:
        """Prepare one step of one KV group; called once per step, group and phase, used by every layer of the group. Device work only, no host
        sync; runs inside graph capture when `graph` was declared. Keeps nothing on self: plan n+1 may be made before attend n."""

    @abstractmethod
    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        """q, out: [num_tokens, num_q_heads, head_dim]; q may be a strided slice. Writes every row of `out` that a sequence owns."""


# ---------------------------------------------------------------- experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRequirements:
    """What the mixture-of-experts layers of this model, on this rank, under these flags, need. One expert a token, and a shared one.

    num_experts: routed ones on this rank.  hidden_size: H.  intermediate_size: I of one expert on this rank, the shared one's too.
    dtype: torch's name of the compute dtype.  weight_format: how routed weights are kept, one of the names in `ExpertWeights`.
    shared_format: the shared expert's, None when the kernel is not given it (the layer then adds it by itself).
    max_num_tokens: rows of one call at most.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    weight_format: str = "plain"
    shared_format: str | None = "plain"
    max_num_tokens: int = 1
    needs_graph: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsUsable:
    """Verdict: the kernel can do all that was required. graph: it may be captured, so it reads nothing back to the host.
    workspace_bytes: device memory it holds for life, plus the most one call takes beside x and the result.
    named_only: never chosen by itself, whatever its tier; `note` says why.
    skips: `forward` takes an id of −1, of a token whose expert another rank holds, gives 0 for it and reads no weight. To other kernels core gives
    some id and a score of 0, with which any expert's result is 0."""

    tier: Tier
    graph: bool = False
    workspace_bytes: int = 0
    named_only: bool = False
    skips: bool = False
    provider: str = ""
    note: str = ""


ExpertVerdict: TypeAlias = ExpertsUsable | Unusable


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One layer's experts, each weight out by in: a row of a matrix makes one output. gate rows come first, then up. Last stride 1.

    format       gate_up, down                                        gate_up_scale, down_scale
    plain        [E, 2I, H], [E, H, I] of the compute dtype           None
    fp8_channel  the same, float8_e4m3fn                              float32 [E, 2I, 1], [E, H, 1]: of an output row
    int4_g128    int16 [E, ⌈H/128⌉, 2I, 32], [E, ⌈I/128⌉, H, 32]:     bfloat16 [E, ⌈H/128⌉, 2I], [E, ⌈I/128⌉, H]: of 128 inputs
                 nibble q of word j of group g is the value + 8 of
                 input 128·g + 32·q + j

    shared_*: the shared expert's, the same without E; all None when the layer adds it by itself.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    shared_gate_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None
    shared_gate_up_scale: torch.Tensor | None = None
    shared_down_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertContext:
    """Handed to `create`. device: torch device string."""

    requirements: ExpertRequirements
    platform: Platform
    device: str
    logger: logging.Logger


class ExpertKernel(ABC):
    """out = down_e(silu(s · gate_e(x)) · (s · up_e(x))) + down(silu(gate(x)) · up(x)), the second term for the shared expert where given.

    One object serves all layers of a model and keeps nothing of a call. A row's result may depend on the number of rows, never on their values.
    """

    def prepare(self, weights: ExpertWeights) -> None:  # noqa: B027  (most kernels read weights as they are loaded)
        """Called once for each layer when its weights are loaded, before the first `forward`: a kernel that reads another order writes it over the
        given tensors."""

    @abstractmethod
    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        """x [T, H], rows contiguous; expert_ids int32 [T] in [0, E), and −1 where the verdict has `skips`; score [T], float32 or wider: s, which
        scales what the routed expert reads.
        → [T, H] in x's dtype; it may be a transposed view and may be changed by the caller. T ≥ 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernelEntry:
    """What `l4_expert_kernels` returns. probe: pure function of plain data (no torch import, opens no device).
    create: "package.module:function", imported only when chosen; called with an ExpertContext; returns an ExpertKernel or raises
    BackendUnavailable. Chosen by `--expert-kernel NAME`, else by tier."""

    name: str
    api: int
    probe: Callable[[Platform, ExpertRequirements], ExpertVerdict]
    create: str


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRow:
    """One row of logits. parsed: what this sampler's `parse` returned.  Token ids are the request's own; position is that of the token
    being drawn (= number of tokens before it)."""

    params: SamplingParams
    parsed: object
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    position: int


class Sampler(ABC):
    """A change of logits. The draw itself (Gumbel-max with counter-based noise) stays in core, so that speculation never changes a token."""

    @abstractmethod
    def parse(self, params: SamplingParams) -> object:
        """Check the request once (its own arguments are `params.sampler_args`). ValueError → HTTP 400 with its text."""

    @abstractmethod
    def transform(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        """logits: float32 [len(rows), vocab_size], not yet divided by the temperature; may be changed in place and returned. Row i must not
        depend on other rows; −inf forbids a token; at least one token must stay finite in each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerEntry:
    """create: "package.module:function" → called with no argument, returns a Sampler. Chosen by `--sampler NAME` or the request field `sampler`."""

    name: str
    api: int
    create: str


# ---------------------------------------------------------------- chat templates


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text: never becomes a special token, whatever it spells."""

    text: str


@dataclass(frozen=True, slots=True)
class Special:
    """One special token by its exact text, such as `<|eot|>`; unknown to the tokenizer = an error."""

    token: str


@dataclass(frozen=True, slots=True)
class Image:
    """The image of content part `index`, in order of appearance."""

    index: int


Piece: TypeAlias = Text | Special | Image


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """index: which call.  name: set once, when known.  arguments: more JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


class ToolParser(ABC):
    """Splits generated text into content and tool calls, as it streams."""

    @abstractmethod
    def feed(self, text: str) -> list[str | ToolCallDelta]:
        """More generated text in, content strings and call deltas out."""

    @abstractmethod
    def finish(self) -> list[str | ToolCallDelta]:
        """The text ended; whatever was held back."""


class ChatTemplate(ABC):
    """Turns messages into pieces. Stateless."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """messages: OpenAI's shape (role, content as a string or a list of parts). ValueError → HTTP 400 with its text."""

    def tool_parser(self) -> ToolParser | None:
        """A new parser for one answer, None when this template has no tool calls."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplateEntry:
    """create: "package.module:function" → called with no argument, returns a ChatTemplate. Chosen by `--chat-template NAME`.
    stop_tokens: special tokens that end an answer beside the checkpoint's own eos ids."""

    name: str
    api: int
    create: str
    stop_tokens: tuple[str, ...] = ()


# ---------------------------------------------------------------- drafters


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftContext:
    """Handed to a drafter's `create`. num_draft_tokens: guesses a sequence may be given in one step.  device: torch device string.
    options: what the user set with `--speculative-option key=value`."""

    vocab_size: int
    num_draft_tokens: int
    device: str
    options: Mapping[str, str]
    logger: logging.Logger


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRow:
    """One sequence that waits for its next token. Token ids are its own, all of them; output_token_ids grows between steps and is never rewritten.
    max_tokens: guesses that can be used, at least 1."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    max_tokens: int


class Drafter(ABC):
    """Proposes tokens that the target then verifies. Whatever it proposes, the emitted tokens are the target's own. One that raises is not asked
    again, and the log says so."""

    @abstractmethod
    def propose(self, rows: Sequence[DraftRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """→ token_ids, parents: int64 [len(rows), K], K at most num_draft_tokens. A token id of −1 ends its row's draft. parents: index of the
        guess before in the same row, −1 = the last committed token; always smaller than the guess's own index. A chain's are −1, 0, 1, …"""

    def forget(self, request_ids: Sequence[str]) -> None:  # noqa: B027  (most drafters remember nothing)
        """These requests have ended; what is remembered of them may go. Unknown ids are no error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterEntry:
    """create: "package.module:function" → called with a DraftContext, returns a Drafter. Chosen by `--speculative-algorithm NAME`.
    options: names that `--speculative-option` may set, with one line of help each.  trees: may propose more than a chain."""

    name: str
    api: int
    create: str
    options: Mapping[str, str] = field(default_factory=dict)
    trees: bool = False
