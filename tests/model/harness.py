"""Runs a model on sequences through paged KV, with no engine: builds ForwardBatch directly, page ids shuffled, dropped local pages poisoned."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

from l4core.attention import reference, sdpa
from l4core.attention.chunked import ring_width, single_chunk_metadata
from l4core.kv.blocks import KVGroup
from l4core.kv.memory import KVMemory
from l4core.kv.superpages import superpage_shape
from l4core.model.batch import AttentionSegment, ForwardBatch
from l4core.model.config import ModelConfig
from l4core.model.llama4 import Llama4
from l4core.plugin_api import AttentionBackend, AttentionMetadata


def ours(
    hf,
    dtype: torch.dtype = torch.float32,
    max_positions: int = 4096,
    device: str = "cpu",
    aux_layers: tuple[int, ...] = (),
    **config_keys: object,
) -> Llama4:
    """Our model with the weights of a transformers model. config_keys: replace keys of its config.json."""
    raw = hf.config.to_dict() | {"architectures": [type(hf).__name__]} | config_keys
    config = ModelConfig.from_dict(raw)
    with torch.device("meta"):
        model = Llama4(config, max_positions=max_positions, aux_layers=aux_layers)
    model = model.to(dtype).to_empty(device=device)
    copy_weights(dict(model.named_parameters()), hf.state_dict())
    return model


def copy_weights(params: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """state: a checkpoint in transformers' names."""
    text = {
        name.removeprefix("model.language_model.").removeprefix("language_model.").removeprefix("model."): w
        for name, w in state.items()
    }
    for name, param in params.items():
        parts = name.split(".")
        layer = "layers." + parts[1] + "." if parts[0] == "layers" else ""
        rest = name.removeprefix(layer)
        moe = layer + "feed_forward."
        sources = {
            "embed.weight": ["embed_tokens.weight"],
            "attn_norm.weight": [layer + "input_layernorm.weight"],
            "mlp_norm.weight": [layer + "post_attention_layernorm.weight"],
            "attn.qkv.weight": [layer + f"self_attn.{x}_proj.weight" for x in "qkv"],
            "attn.o.weight": [layer + "self_attn.o_proj.weight"],
            "mlp.gate_up.weight": [moe + "gate_proj.weight", moe + "up_proj.weight"],
            "mlp.down.weight": [moe + "down_proj.weight"],
            "moe.router.weight": [moe + "router.weight"],
            "moe.shared.gate_up.weight": [moe + "shared_expert.gate_proj.weight", moe + "shared_expert.up_proj.weight"],
            "moe.shared.down.weight": [moe + "shared_expert.down_proj.weight"],
            "moe.experts.gate_up": [moe + "experts.gate_up_proj"],
            "moe.experts.down": [moe + "experts.down_proj"],
        }.get(rest, [rest])
        param.copy_(torch.cat([text[source] for source in sources]))


def backend_of(name: str, page_size: int, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    if name == "reference":
        return reference.ReferenceBackend(page_size)
    return sdpa.SdpaBackend(page_size, dtype, host_lengths=name == "sdpa")


class Harness:
    """step({sequence: new tokens}) → {sequence: logits of those tokens}. aux: what the model handed out in the last step, in batch order."""

    def __init__(
        self,
        model: Llama4,
        backend: str = "sdpa",
        *,
        page_size: int = 16,
        max_len: int = 512,
        num_seqs: int = 1,
        device: str = "cpu",
    ) -> None:
        config, self.model, self.page_size, self.device = model.config, model, page_size, device
        dtype = model.embed.weight.dtype
        self.backend, self.groups = backend_of(backend, page_size, dtype), config.kv_groups()
        self.width = {
            g.name: -(-max_len // page_size) if g.chunk_size is None else ring_width(g.chunk_size, page_size)
            for g in self.groups
        }
        wanted = {name: num_seqs * width for name, width in self.width.items()}
        self.memory, pages = deal_memory(model, wanted, page_size, device)
        self.free = {name: random.Random(0).sample(mine, wanted[name]) for name, mine in pages.items()}
        for name, pages in self.free.items():
            self.memory.poison(name, pages)
        self.tables = {name: torch.zeros(num_seqs, width, dtype=torch.int32) for name, width in self.width.items()}
        self.lens = [0] * num_seqs

    def step(self, pieces: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """No piece may cross a chunk border."""
        seqs = sorted(pieces, key=lambda s: len(pieces[s]) != 1)  # decodes first
        num_decodes = sum(len(pieces[s]) == 1 for s in seqs)
        positions = torch.cat([torch.arange(self.lens[s], self.lens[s] + len(pieces[s])) for s in seqs])
        owner = torch.tensor([s for s in seqs for _ in pieces[s]])
        for s in seqs:
            self._reserve(s, self.lens[s], self.lens[s] + len(pieces[s]))
            self.lens[s] += len(pieces[s])
        slots = {}
        for name, table in self.tables.items():
            page = table[owner, positions // self.page_size % table.shape[1]].long()
            slots[name] = (page * self.page_size + positions % self.page_size).to(self.device)
        spans = [(0, num_decodes), (num_decodes, len(seqs))]
        batch = ForwardBatch(
            token_ids=torch.tensor([t for s in seqs for t in pieces[s]], device=self.device),
            positions=positions.to(self.device),
            slot_mapping=slots,
            segments=[self._segment(seqs, pieces, a, b) for a, b in spans if b > a],
            logits_rows=torch.arange(len(owner)),
        )
        with torch.inference_mode():
            weight = self.model.embed.weight
            self.aux = weight.new_empty(len(owner), len(self.model.aux_layers) * weight.shape[1])
            aux = self.aux if self.model.aux_layers else None
            logits = self.model.logits(self.model(batch, self.memory, self.backend, aux))
        self._drop_finished_chunks(seqs)
        return dict(zip(seqs, logits.split([len(pieces[s]) for s in seqs]), strict=True))

    def prefill(self, ids: Sequence[int], size: int = 10**9, seq: int = 0) -> torch.Tensor:
        """Logits of all ids, computed in pieces of at most `size`, cut at chunk borders."""
        chunk, done, out = self.model.config.attention_chunk_size or 10**9, 0, []
        while done < len(ids):
            at = self.lens[seq]
            n = min(size, len(ids) - done, chunk - at % chunk)
            out.append(self.step({seq: ids[done : done + n]})[seq])
            done += n
        return torch.cat(out)

    def _segment(self, seqs: Sequence[int], pieces: Mapping[int, Sequence[int]], a: int, b: int) -> AttentionSegment:
        counts = [len(pieces[s]) for s in seqs]
        begin, lens = sum(counts[:a]), [self.lens[s] for s in seqs[a:b]]
        meta = AttentionMetadata(
            cu_seqlens_q=torch.tensor(
                [0, *torch.tensor(counts[a:b]).cumsum(0).tolist()], dtype=torch.int32, device=self.device
            ),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=self.device),
            block_table=torch.zeros(0),
            max_seqlen_q=max(counts[a:b]),
            max_seqlen_k=max(lens),
            num_seqs=b - a,
            phase="decode" if max(counts[a:b]) == 1 else "prefill",
        )
        plans = {}
        for group in self.groups:
            table = self.tables[group.name][torch.tensor(seqs[a:b])].to(self.device)
            plans[group.name] = self.backend.plan(_local(meta, table, group, self.page_size))
        return AttentionSegment(begin=begin, end=begin + sum(counts[a:b]), plans=plans)

    def _reserve(self, s: int, begin: int, end: int) -> None:
        for name, table in self.tables.items():
            for index in range(-(-begin // self.page_size), -(-end // self.page_size)):
                table[s, index % table.shape[1]] = self.free[name].pop()

    def _drop_finished_chunks(self, seqs: Sequence[int]) -> None:
        for group in self.groups:
            if group.chunk_size is None:
                continue
            table, half = self.tables[group.name], self.width[group.name] // 2
            for s in seqs:
                chunk = self.lens[s] // group.chunk_size  # of the next token
                for column in range(2 * half):
                    page = int(table[s, column])
                    if page and column // half != chunk % 2:
                        self.memory.poison(group.name, [page])
                        self.free[group.name].insert(0, page)
                        table[s, column] = 0


def meta_step(model: Llama4, counts: Sequence[int], page_size: int = 16, device: str = "meta") -> torch.Tensor:
    """One step as an accelerator runs it, on the meta device by default, where no value can be read. → logits."""
    groups, total = model.config.kv_groups(), sum(counts)
    memory, backend = (
        deal_memory(model, {g.name: 8 for g in model.config.kv_groups()}, page_size, device)[0],
        sdpa.SdpaBackend(page_size, model.embed.weight.dtype, host_lengths=False),
    )
    lens = torch.zeros(len(counts), dtype=torch.int32, device=device)
    meta = AttentionMetadata(
        cu_seqlens_q=torch.zeros(len(counts) + 1, dtype=torch.int32, device=device),
        seq_lens=lens,
        block_table=torch.zeros(len(counts), 8, dtype=torch.int32, device=device),
        max_seqlen_q=max(counts),
        max_seqlen_k=100,
        num_seqs=len(counts),
        phase="decode" if max(counts) == 1 else "prefill",
    )
    ids = torch.zeros(total, dtype=torch.int64, device=device)
    plans = {g.name: backend.plan(_local(meta, meta.block_table, g, page_size)) for g in groups}
    segment = AttentionSegment(begin=0, end=total, plans=plans)
    batch = ForwardBatch(
        token_ids=ids, positions=ids, slot_mapping={g.name: ids for g in groups}, segments=[segment], logits_rows=ids
    )
    return model.logits(model(batch, memory, backend))


class StaticDecode:
    """One decode of `num_seqs` sequences in tensors that never move: what a graph captures."""

    def __init__(self, model: Llama4, *, num_seqs: int, device: str, page_size: int = 16, max_len: int = 128) -> None:
        self.model, self.page_size, self.num_seqs, self.max_len, self.device = (
            model,
            page_size,
            num_seqs,
            max_len,
            device,
        )
        groups = model.config.kv_groups()
        self.memory, self.pages = deal_memory(
            model, {g.name: num_seqs * max_len // page_size for g in groups}, page_size, device
        )
        self.backend = sdpa.SdpaBackend(page_size, model.embed.weight.dtype, host_lengths=False)
        self.token_ids, self.positions, self.slots = (
            torch.zeros(num_seqs, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.lens = torch.zeros(num_seqs, dtype=torch.int32, device=device)
        self.cu = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self.table = torch.zeros(num_seqs, max_len // page_size, dtype=torch.int32, device=device)

    def fill(self, seed: int) -> None:
        """Other tokens, lengths, pages and KV."""
        generator = torch.Generator().manual_seed(seed)
        for layer in range(self.model.config.num_layers):
            pages = self.memory.pages(layer)
            pages[1:] = torch.randn(pages[1:].shape, generator=generator).to(pages)
        order = torch.randperm(self.table.numel(), generator=generator).view(self.table.shape)
        lens = torch.randint(1, self.max_len + 1, (self.num_seqs,), generator=generator)
        page = order.gather(1, ((lens - 1) // self.page_size).unsqueeze(1)).squeeze(1)
        self.table.copy_(order)
        self.lens.copy_(lens)
        self.positions.copy_(lens - 1)
        self.slots.copy_(page * self.page_size + (lens - 1) % self.page_size)
        self.token_ids.copy_(torch.randint(0, 256, (self.num_seqs,), generator=generator))

    def run(self) -> torch.Tensor:
        meta = AttentionMetadata(
            cu_seqlens_q=self.cu,
            seq_lens=self.lens,
            block_table=self.table,
            max_seqlen_q=1,
            max_seqlen_k=self.max_len,
            num_seqs=self.num_seqs,
            phase="decode",
        )
        groups = self.model.config.kv_groups()
        first = {g.name: self.pages[g.name].start for g in groups}  # the same order of pages in every group
        plans = {g.name: self.backend.plan(_local(meta, self.table + first[g.name], g, self.page_size)) for g in groups}
        batch = ForwardBatch(
            token_ids=self.token_ids,
            positions=self.positions,
            slot_mapping={g.name: self.slots + first[g.name] * self.page_size for g in groups},
            segments=[AttentionSegment(begin=0, end=self.num_seqs, plans=plans)],
            logits_rows=self.token_ids,
        )
        with torch.inference_mode():
            return self.model.logits(self.model(batch, self.memory, self.backend))


def deal_memory(
    model: Llama4, wanted: Mapping[str, int], page_size: int, device: str
) -> tuple[KVMemory, dict[str, range]]:
    """Memory for so many pages of each group, and which they are: groups share the buffer, so their superpages are apart."""
    config, groups = model.config, model.config.kv_groups()
    shape, first, pages = superpage_shape(groups), 1, {}
    for group in groups:
        per, count = shape.pages[group.name], wanted[group.name]
        pages[group.name] = range(first * per, first * per + count)
        first += -(-count // per)
    plan = SimpleNamespace(page_size=page_size, shape=shape, num_superpages=first)
    memory = KVMemory(groups, plan, config.num_kv_heads, config.head_dim, model.embed.weight.dtype, device)
    return memory, pages


def _local(meta: AttentionMetadata, table: torch.Tensor, group: KVGroup, page_size: int) -> AttentionMetadata:
    if group.chunk_size is None:
        return replace(meta, block_table=table)
    return single_chunk_metadata(meta, table, group.chunk_size, page_size)
