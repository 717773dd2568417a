"""Holds a probe's verdict to what was asked: its fields must be sound, and a capability that is needed and not declared is a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from l4core.errors import BackendUnavailable
from l4core.plugin_api import AttentionRequirements, Tier, Unusable, Usable

MAX_TREE_NODES = 64
"""Bits of TreeMask.ancestors."""


def hold_to(verdict: object, req: AttentionRequirements) -> Usable | Unusable:
    """The verdict itself, or Unusable where it is none, is malformed, or does not cover `req`. Never raises."""
    if isinstance(verdict, Unusable):
        return verdict if verdict.reason else Unusable(reason="its probe refused without a reason", fix=verdict.fix)
    if not isinstance(verdict, Usable):
        return Unusable(reason=f"its probe returned {type(verdict).__name__}; wanted Usable or Unusable")
    for wrong in malformed(verdict):
        return Unusable(reason=f"its probe returned a Usable whose {wrong}")
    for missing in _missing(verdict, req):
        return missing
    return verdict


def malformed(verdict: Any) -> Iterator[str]:
    """What is wrong with the fields of a Usable, whatever was asked: "tier is 20; wanted a Tier"."""
    if not isinstance(verdict.tier, Tier):
        yield f"tier is {verdict.tier!r}; wanted a Tier"
    sizes = verdict.page_sizes
    if sizes is not None and not (isinstance(sizes, tuple) and sizes and all(_is_size(size) for size in sizes)):
        yield f"page_sizes is {sizes!r}; wanted None or a tuple of positive integers"
    if not _is_size(verdict.preferred_page_size):
        yield f"preferred_page_size is {verdict.preferred_page_size!r}; wanted a positive integer"
    if verdict.page_stride not in ("free", "dense"):
        yield f"page_stride is {verdict.page_stride!r}; wanted 'free' or 'dense'"
    if not (type(verdict.workspace_bytes) is int and verdict.workspace_bytes >= 0):
        yield f"workspace_bytes is {verdict.workspace_bytes!r}; wanted a number of bytes, 0 or more"


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _missing(verdict: Usable, req: AttentionRequirements) -> Iterator[Unusable]:
    sizes = verdict.page_sizes
    if req.page_size is not None and sizes is not None and req.page_size not in sizes:
        yield Unusable(
            reason=f"page size {req.page_size} is asked for; this backend takes {_words(sizes)}",
            fix=f"--page-size {verdict.preferred_page_size if verdict.preferred_page_size in sizes else sizes[0]}",
        )
    elif not _page_sizes(verdict, req):
        found = f"page size {req.page_size}" if req.page_size else f"page sizes {_words(sizes or ())}"
        yield Unusable(reason=f"{found}: wanted a divisor of the attention chunk of {req.chunk_size}")
    if req.needs_tree and not verdict.tree_mask:
        yield Unusable(reason="a tree mask is asked for; this backend declares none", fix="--speculative-eagle-topk 1")
    if req.needs_tree and req.num_draft_tokens >= MAX_TREE_NODES:
        yield Unusable(
            reason=f"a tree of {req.num_draft_tokens + 1} nodes is asked for; a tree mask holds {MAX_TREE_NODES}",
            fix=f"--speculative-num-draft-tokens {MAX_TREE_NODES - 1}",
        )
    if req.needs_graph and not verdict.graph:
        yield Unusable(
            reason="graph capture is asked for; this backend does not declare it", fix="--disable-cuda-graph"
        )


def _words(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def _page_sizes(verdict: Usable, req: AttentionRequirements) -> list[int]:
    """Page sizes that this verdict and this request allow, ascending. Any size: those of 1 … preferred are listed."""
    sizes = verdict.page_sizes if verdict.page_sizes is not None else range(1, verdict.preferred_page_size + 1)
    if req.page_size is not None:
        sizes = (req.page_size,) if verdict.page_sizes is None or req.page_size in verdict.page_sizes else ()
    return sorted(size for size in sizes if req.chunk_size is None or req.chunk_size % size == 0)


def choose_page_size(verdict: Usable, req: AttentionRequirements) -> int:
    """The page size asked for; otherwise the preferred one, or where that does not divide the chunk the largest allowed below it, or the smallest
    above. Raises BackendUnavailable when none fits (`hold_to` has refused such a verdict already)."""
    allowed = _page_sizes(verdict, req)
    if not allowed:
        raise BackendUnavailable(
            f"no page size fits: asked for {req.page_size}, backend {verdict.page_sizes}, attention chunk {req.chunk_size}"
        )
    below = [size for size in allowed if size <= verdict.preferred_page_size]
    return below[-1] if below else allowed[0]
