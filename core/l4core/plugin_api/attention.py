"""Attention backends: what is asked of one, its verdict and entry, and what it is given in a step. Shapes and masks are said here once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from l4core.platform import Platform
from l4core.plugin_api.verdict import Tier, Unusable

if TYPE_CHECKING:
    import logging

    import torch

__all__ = [
    "AttentionBackend",
    "AttentionBackendEntry",
    "AttentionContext",
    "AttentionMetadata",
    "AttentionRequirements",
    "ChunkInfo",
    "KVView",
    "Plan",
    "TreeMask",
    "Usable",
    "Verdict",
]

# ---------------------------------------------------------------- selection


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


# ---------------------------------------------------------------- running


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

    without_memory: `plan` and `attend` are torch's operations and Triton launches alone, so both can be called with tensors on the meta device that
    pass for the device's, to learn which kernels to compile before the first step.
    """

    without_memory: ClassVar[bool] = False

    @abstractmethod
    def plan(self, meta: AttentionMetadata) -> Plan:
        """Prepare one step of one KV group; called once per step, group and phase, used by every layer of the group. Device work only, no host
        sync; runs inside graph capture when `graph` was declared. Keeps nothing on self: plan n+1 may be made before attend n."""

    @abstractmethod
    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        """q, out: [num_tokens, num_q_heads, head_dim]; q may be a strided slice. Writes every row of `out` that a sequence owns."""
