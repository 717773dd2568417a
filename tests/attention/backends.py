"""Stand-in backends for selection tests: `create` targets that work, refuse, break or answer wrongly. Imported by name, as a plugin's would be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from l4core.attention import reference
from l4core.attention.chunked import virtual_batches
from l4core.plugin_api import AttentionBackend, AttentionContext, AttentionMetadata, BackendUnavailable, KVView, Plan


def good(context: AttentionContext) -> AttentionBackend:
    return reference.create(context)


def refuses(context: AttentionContext) -> AttentionBackend:
    raise BackendUnavailable("libvendor 1.0 found; wanted 2.0", fix="pip install libvendor==2.0")


def raises(context: AttentionContext) -> AttentionBackend:
    raise RuntimeError("no kernel image is available")


def exits(context: AttentionContext) -> AttentionBackend:
    raise SystemExit("vendor library gave up")


def returns_nonsense(context: AttentionContext) -> object:
    return object()


SEEN: list[AttentionContext] = []


def records_context(context: AttentionContext) -> AttentionBackend:
    SEEN.append(context)
    return reference.create(context)


@dataclass
class Wrong(AttentionBackend):
    """The reference with one mistake; `mistake` names it."""

    inner: AttentionBackend
    mistake: str

    def plan(self, meta: AttentionMetadata) -> Plan:
        if self.mistake == "mask one short":
            meta = replace(meta, seq_lens=(meta.seq_lens - 1).clamp(min=1))
        if self.mistake == "first page twice":
            meta = replace(meta, block_table=meta.block_table[:, :1].expand_as(meta.block_table))
        if self.mistake == "rows shifted":
            rows = meta.cu_seqlens_q.diff().flip(0)
            meta = replace(meta, cu_seqlens_q=torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int())
        tree = meta.tree
        if self.mistake == "tree ignored":
            meta = replace(meta, tree=None)
        if self.mistake == "tree of the first" and tree is not None:  # one static tree for the whole batch
            nodes = meta.max_seqlen_q
            meta = replace(meta, tree=replace(tree, ancestors=tree.ancestors[:nodes].repeat(meta.num_seqs)))
        if self.mistake == "prefix always seen" and tree is not None:
            meta = replace(meta, tree=replace(tree, sees_prefix=None))
        if self.mistake == "one row a sequence" and 0 in meta.cu_seqlens_q.diff() and meta.phase == "verify":
            meta = replace(meta, cu_seqlens_q=torch.arange(meta.num_seqs + 1, dtype=torch.int32))
        if self.mistake == "plan raises":
            raise RuntimeError("workspace too small")
        return self.inner.plan(meta)

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        if self.mistake == "dense strides":  # reads memory as if pages lay back to back
            kv = KVView(k=kv.k.as_strided(kv.k.shape, kv.k.contiguous().stride()), v=kv.v)
        if self.mistake == "keys for values":
            kv = KVView(k=kv.v, v=kv.k)
        if self.mistake == "no scale":
            q = q * q.shape[-1] ** 0.5
        if self.mistake == "heads interleaved":
            q = q.reshape(q.shape[0], -1, kv.k.shape[2], q.shape[2]).transpose(1, 2).reshape(q.shape)
        if self.mistake == "packed queries":  # ignores the strides of q
            q = q.as_strided(q.shape, (q.shape[1] * q.shape[2], q.shape[2], 1))
        if self.mistake == "writes nothing":
            out = torch.empty_like(out)
        self.inner.attend(q, kv, plan, out)
        if self.mistake == "whole tiles":  # 0 · NaN from slots nobody owns
            out += 0 * kv.v[1:].sum()


def wrong(context: AttentionContext) -> AttentionBackend:
    """Comes up, and computes nonsense."""
    return Wrong(reference.create(context), "mask one short")


@dataclass
class NativeChunk(AttentionBackend):
    """Takes the chunk's size itself: moves each sequence's table to its current chunk. Not honest: ignores it."""

    inner: AttentionBackend
    honest: bool

    def __post_init__(self) -> None:
        self.seen: set[object] = set()
        self.widths: set[int] = set()

    def plan(self, meta: AttentionMetadata) -> Plan:
        self.seen.add(meta.chunk)
        if meta.chunk is None:
            return self.inner.plan(meta)
        self.widths.add(meta.block_table.shape[1])
        if not self.honest:
            return self.inner.plan(replace(meta, chunk=None))
        cut = virtual_batches(meta, meta.block_table, meta.chunk.size, 8, 2)
        return self.inner.plan(replace(cut, chunk=None))

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        self.inner.attend(q, kv, plan, out)
