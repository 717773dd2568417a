"""Filling a model whose weights are kept in fewer bits, from a plain checkpoint or a quantised one, without ever holding the plain model.

A weight that lies in the file as it is kept (FP8) is copied straight into place. Any other is brought to the device as one matrix, one expert at a
time, changed there and dropped; so beside the model a load holds the largest matrix and what changing it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from l4core.errors import CheckpointError
from l4core.model.boxes import replace
from l4core.model.config import ModelConfig
from l4core.model.layout_quant import INPUT_SCALE, WEIGHT_SCALE, scale_name
from l4core.model.slicing import Region
from l4core.model.weight_plan import Target, WeightPlan
from l4core.parallel.ranks import Ranks
from l4core.quant import fp8, int4
from l4core.quant.formats import FP8


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One matrix that is not kept as it is stored. name: of the weight.  expert: None = not one of several.  sources: what is read for it: (place
    to fill, regions).  finish: changes what was read and writes it into the model."""

    name: str
    expert: int | None
    sources: tuple[tuple[torch.Tensor, tuple[Region, ...]], ...]
    finish: Callable[[], None]


def split_plan(plan: WeightPlan, params: Mapping[str, torch.Tensor]) -> tuple[WeightPlan, list[Target]]:
    """(the part of a plan that is copied straight into place, the targets that are not). Input scales are in neither: see quant.fp8."""
    straight = [t for t in plan.targets if _fits(t, params.get(t.name))]
    names = {t.name for t in straight}
    rest = [t for t in plan.targets if t.name not in names and not t.name.endswith(INPUT_SCALE)]
    return dataclasses.replace(plan, targets=tuple(straight)), rest


def _fits(target: Target, param: torch.Tensor | None) -> bool:
    if param is None or tuple(param.shape) != target.shape:
        return False
    return (param.dtype == torch.float8_e4m3fn) == (target.dtype == "float8_e4m3fn") and param.dtype != torch.int16


class Quantising:
    """How the weights of one load get from the checkpoint's format to the model's. formats: of the model.  config: of this rank.  ranks: all that
    load; they make the same changes in the same order, in `ep` groups for the experts."""

    def __init__(self, formats: Mapping[str, str], config: ModelConfig, ranks: Ranks, ep: int) -> None:
        self.formats, self.config = formats, config
        self._ranks, self._ep = ranks, ep

    def changes(self, rest: Sequence[Target], params: Mapping[str, torch.Tensor]) -> Iterator[Change]:
        """What has to be done for `rest`, one matrix after the other; each allocates what it needs when it is reached."""
        by_name = {target.name: target for target in rest}
        for name, kept in self.formats.items():
            scale = scale_name(name, WEIGHT_SCALE)
            weight = params[name]
            if name in by_name:
                yield from self._quantise(by_name.pop(name), kept, weight, params[scale])
            elif scale_name(name, "weight_packed") in by_name:
                words, scales = (
                    by_name.pop(scale_name(name, "weight_packed")),
                    by_name.pop(scale_name(name, "weight_scale")),
                )
                yield from _repack(words, scales, weight, params[scale])
            elif scale in by_name:
                yield _spread(by_name.pop(scale), params[scale], self.config)
        if by_name:
            raise CheckpointError(f"parameter {next(iter(by_name))} is known to the checkpoint layout only")

    def _quantise(self, target: Target, kept: str, weight: torch.Tensor, scale: torch.Tensor) -> Iterator[Change]:
        """Plain in the file."""
        dtype = getattr(torch, target.dtype)
        for expert in _experts(target):
            shape = target.shape[1:] if expert is not None else target.shape
            # Out by in, as the formats want it; an expert's place in the plan is in by out.
            rows = torch.empty(shape[::-1] if expert is not None else shape, dtype=dtype, device=weight.device)
            place = rows.t().unsqueeze(0) if expert is not None else rows

            def finish(rows: torch.Tensor = rows, expert: int | None = expert) -> None:
                largest = self._largest(rows, target) if kept == FP8 else None
                made, its_scale = int4.quantize(rows) if largest is None else fp8.quantize(rows, largest)
                here = weight if expert is None else weight[expert]
                here.copy_(made.t() if expert is not None and kept == FP8 else made)
                (scale if expert is None else scale[expert]).copy_(its_scale)

            sources = ((place, _regions_of(target, expert)),)
            yield Change(name=target.name, expert=expert, sources=sources, finish=finish)

    def _largest(self, rows: torch.Tensor, target: Target) -> torch.Tensor:
        """Of each whole row, of which this rank may have a part: so the scale is the one that a rank alone would find."""
        largest = rows.abs().amax(-1, keepdim=True)
        if not target.cut_on_inputs:
            return largest
        every = self._ranks.all_gather(largest)  # [ranks, rows, 1]
        cut = self._ranks.size // (self._ep if target.routed else 1)
        first = self._ranks.rank // cut * cut
        return every[first : first + cut].amax(0)


def _repack(words: Target, scales: Target, weight: torch.Tensor, scale: torch.Tensor) -> Iterator[Change]:
    """Four bits in the file, in another order."""
    for expert in _experts(words):
        cut = slice(None) if expert is None else slice(1, None)
        read = torch.empty(words.shape[cut], dtype=torch.int32, device=weight.device)
        read_scale = torch.empty(scales.shape[cut], dtype=torch.float32, device=weight.device)

        def finish(
            read: torch.Tensor = read, read_scale: torch.Tensor = read_scale, expert: int | None = expert
        ) -> None:
            made, its_scale = int4.from_compressed_tensors(read, read_scale)
            (weight if expert is None else weight[expert]).copy_(made)
            (scale if expert is None else scale[expert]).copy_(its_scale)

        places = (read, read_scale) if expert is None else (read.unsqueeze(0), read_scale.unsqueeze(0))
        sources = ((places[0], _regions_of(words, expert)), (places[1], _regions_of(scales, expert)))
        yield Change(name=words.name, expert=expert, sources=sources, finish=finish)


def _spread(target: Target, scale: torch.Tensor, config: ModelConfig) -> Change:
    """One scale a tensor in the file, [parts] or [experts, parts]; each goes to the outputs of its part. A single one goes everywhere."""
    read = torch.empty(target.shape, dtype=torch.float32)
    outputs, parts = scale.shape[-2], target.shape[-1]
    sizes = [outputs // parts] * parts
    if target.name.endswith("attn.qkv.weight_scale") and parts == 3:
        heads = outputs // config.head_dim
        kv = heads * config.num_kv_heads // (config.num_q_heads + 2 * config.num_kv_heads)
        sizes = [size * config.head_dim for size in (heads - 2 * kv, kv, kv)]

    def finish() -> None:
        rows = read.repeat_interleave(torch.tensor(sizes), dim=-1).unsqueeze(-1)
        scale.copy_(rows.expand(scale.shape))

    return Change(name=target.name, expert=None, sources=((read, target.regions),), finish=finish)


def _experts(target: Target) -> Sequence[int | None]:
    return range(target.shape[0]) if len(target.shape) == 3 else (None,)


def _regions_of(target: Target, expert: int | None) -> tuple[Region, ...]:
    """The copies that fill one expert's matrix, as if there were no other expert."""
    if expert is None:
        return target.regions
    made = []
    for region in target.regions:
        (start, stop), *rest = region.target_box
        if not start <= expert < stop:
            continue
        source = region.source_box
        if len(source) == len(region.target_box):  # fused: one of the source's experts
            at = source[0][0] + expert - start
            source = replace(source, 0, (at, at + 1))
        made.append(dataclasses.replace(region, source_box=source, target_box=((0, 1), *rest)))
    return tuple(made)
