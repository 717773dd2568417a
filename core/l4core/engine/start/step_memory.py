"""What a step needs beside weights and KV, from shapes alone: activations, logits, block tables, graphs. Torch-free.

The terms follow model/llama4.py and model/moe.py: what is alive at the largest moment of a layer, or while tokens are drawn. Measured against
the allocator on a GPU (docs/decisions/012-memory-plan.md) and against live tensors on a CPU (tests/engine/test_step_memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from l4core.engine.start.memory_budget import Needs
from l4core.model.config import ModelConfig

INDEX_BYTES = 160
"""A token's ids, positions, slots, routing: sixteen int64 and some to spare."""
DRAW_BLOCK = 1 << 24
"""Elements of logits for which noise is made at a time (sampling.blocks), and how many float32 of each are alive then."""
DRAW_COPIES = 10
GRAPH_BYTES = 8 << 20
"""A captured graph's own memory, beside the pool that all graphs share."""


def needs_of(
    config: ModelConfig,
    *,
    weights: int,
    workspace: int,
    num_tokens: int,
    max_running: int,
    context_length: int | None,
    page_size: int,
    itemsize: int,
    device_bytes: int,
    graph_batches: Sequence[int] = (),
    num_drafts: int = 0,
) -> Needs:
    """All of one rank. config: of the rank.  num_tokens: computed in one step at most.  num_drafts: verified per sequence.
    context_length: None = not known yet, so tables are those of the largest context that a device of `device_bytes` could hold."""
    rows = 2 * config.num_kv_heads * config.head_dim * itemsize
    longest = context_length or min(config.max_position_embeddings, device_bytes // (rows * _num_global(config)))
    return Needs(
        weights=weights,
        workspace=workspace,
        step=step_bytes(config, num_tokens=num_tokens, num_rows=max_running * (num_drafts + 1), itemsize=itemsize),
        tables=table_bytes(config, max_running=max_running, max_context=longest, page_size=page_size),
        graphs=graph_bytes(config, graph_batches, max_context=longest, page_size=page_size, itemsize=itemsize),
    )


def _num_global(config: ModelConfig) -> int:
    return max(1, config.num_layers - sum(config.chunked_layers))


def step_bytes(config: ModelConfig, *, num_tokens: int, num_rows: int, itemsize: int) -> int:
    """Most bytes that one step holds at once. config: of one rank.  num_tokens: computed in it.  num_rows: of which logits are taken.
    itemsize: bytes of an element of the compute dtype."""
    return max(
        _layer_bytes(config, num_tokens, itemsize), _draw_bytes(config, min(num_rows, num_tokens), num_tokens, itemsize)
    )


def _layer_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """The residual stream and the normed input of a half layer, with attention's or the MLP's own."""
    hidden = config.hidden_size
    q, kv = config.num_q_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    attention = 2 * q + kv + hidden
    moe = 4 * hidden + 3 * config.intermediate_size if any(config.moe_layers) else 0
    dense = 0 if all(config.moe_layers) else max(3 * config.intermediate_size_mlp, hidden)
    angles = 4 * config.head_dim * len({c for r, c in zip(config.rope_layers, config.chunked_layers, strict=True) if r})
    return num_tokens * ((2 * hidden + max(attention, moe, dense)) * itemsize + angles + INDEX_BYTES)


def _draw_bytes(config: ModelConfig, num_rows: int, num_tokens: int, itemsize: int) -> int:
    """Hidden states before and after the last norm, logits as computed and in float32, and one block's noise."""
    logits = num_rows * config.vocab_size
    block = min(logits, max(DRAW_BLOCK, config.vocab_size))
    return num_tokens * 2 * config.hidden_size * itemsize + logits * (itemsize + 4) + block * 4 * DRAW_COPIES


def table_bytes(config: ModelConfig, *, max_running: int, max_context: int, page_size: int) -> int:
    """Block tables of all rows: int32, pages of the largest context in the global group, of two chunks in the local one."""
    columns = -(-max_context // page_size)
    for group in config.kv_groups():
        if group.chunk_size is not None:
            columns += 2 * group.chunk_size // page_size
    return 4 * max_running * columns


def graph_bytes(config: ModelConfig, batches: Sequence[int], *, max_context: int, page_size: int, itemsize: int) -> int:
    """Captured decode steps of these batches: they share the memory of the largest one, with its rows of block tables. 0 without graphs."""
    if not batches:
        return 0
    largest = max(batches)
    pool = step_bytes(config, num_tokens=largest, num_rows=largest, itemsize=itemsize)
    tables = table_bytes(config, max_running=largest, max_context=max_context, page_size=page_size)
    return pool + tables + len(batches) * GRAPH_BYTES
