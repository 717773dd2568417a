"""Which elements of which checkpoint tensor a rank takes, and where they stand in its share of a parameter. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from l4core.errors import ConfigError
from l4core.model.boxes import Box, Shape, joined, replace, whole
from l4core.model.config import ModelConfig
from l4core.model.layout import Parameter, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One copy: target[target_box] = source[source_box], its two dimensions swapped where `transpose`.

    source: checkpoint name in full.  The target box of one expert has the expert's index as a range of one in front.
    """

    source: str
    source_box: Box
    target_box: Box
    transpose: bool = False


def check_world(config: ModelConfig, world: int) -> None:
    """Raises ConfigError naming the sizes that work when `world` ranks cannot share this model evenly."""
    if world < 1 or not _divides(config, world):
        usable = [str(n) for n in range(1, config.num_q_heads + 1) if _divides(config, n)]
        raise ConfigError(
            f"{world} tensor-parallel ranks cannot share {config.num_q_heads} query heads, {config.num_kv_heads} KV heads, "
            f"intermediate size {config.intermediate_size} and vocabulary {config.vocab_size} evenly",
            fix=f"--tp {', '.join(usable)}",
        )


def _divides(config: ModelConfig, world: int) -> bool:
    sizes = [config.num_q_heads, config.vocab_size, config.intermediate_size]
    sizes += [] if all(config.moe_layers) else [config.intermediate_size_mlp]
    kv_even = config.num_kv_heads % world == 0 or world % config.num_kv_heads == 0
    return kv_even and all(size % world == 0 for size in sizes)


def rank_config(config: ModelConfig, world: int) -> ModelConfig:
    """The model that one of `world` ranks is by itself: a whole model whose every parameter has the rank's shape (all ranks have the same).

    Without the sums over ranks it computes nothing of use, but it takes a rank's time and memory. Raises ConfigError as `check_world` does.
    """
    check_world(config, world)
    dense = not all(config.moe_layers)
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // world,
        num_q_heads=config.num_q_heads // world,
        num_kv_heads=max(1, config.num_kv_heads // world),
        intermediate_size=config.intermediate_size // world,
        intermediate_size_mlp=config.intermediate_size_mlp // (world if dense else 1),
    )


def rank_shape(parameter: Parameter, rank: int, world: int) -> Shape:
    """Shape of a rank's share of the parameter."""
    of_one_expert = (part for part in parameter.parts if part.expert == parameter.parts[0].expert)
    stacked = sum(_stacked(part, _source_box(part, rank, world), parameter.stack) for part in of_one_expert)
    return (*parameter.shape[: parameter.stack], stacked, *parameter.shape[parameter.stack + 1 :])


def regions(parameter: Parameter, rank: int, world: int, names: Mapping[str, str]) -> list[Region]:
    """All copies that make up a rank's share. Two copies that lie side by side in both tensors are one (fused gate and up at world 1).

    names: source without prefix → full name; parts whose source is not in it are left out.
    """
    made: list[Region] = []
    shape = whole(rank_shape(parameter, rank, world))
    position, expert = 0, None
    for part in parameter.parts:
        if part.expert != expert:
            position, expert = 0, part.expert
        source = _source_box(part, rank, world)
        size = _stacked(part, source, parameter.stack)
        target = replace(shape, parameter.stack, (position, position + size))
        if expert is not None:
            target = replace(target, 0, (expert, expert + 1))
        position += size
        if part.source not in names:
            continue
        new = Region(source=names[part.source], source_box=source, target_box=target, transpose=part.transpose)
        both = _merged(made[-1], new) if made else None
        if both is not None:
            made[-1] = both
        else:
            made.append(new)
    return made


def _source_box(part: Part, rank: int, world: int) -> Box:
    box = whole(part.shape)
    if part.split is None:
        return box
    units = part.size // part.unit
    if part.shared and units < world:
        low = rank * units // world
        high = low + 1
    else:
        low, high = units * rank // world, units * (rank + 1) // world
    return replace(box, part.split, (part.first + low * part.unit, part.first + high * part.unit))


def _stacked(part: Part, source: Box, stack: int) -> int:
    """Elements of a rank's share of this part along the parameter's dimension `stack`."""
    dim = stack if part.expert is None else stack - 1
    start, stop = source[1 - dim if part.transpose else dim]
    return stop - start


def _merged(first: Region, second: Region) -> Region | None:
    if first.source != second.source or first.transpose or second.transpose:
        return None
    source = joined(first.source_box, second.source_box)
    target = joined(first.target_box, second.target_box)
    if source is None or target is None or source[0] != target[0]:
        return None
    return Region(source=first.source, source_box=source[1], target_box=target[1])
