"""Which elements of which checkpoint tensor a rank takes, and where they stand in its share of a parameter. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from l4core.errors import ConfigError
from l4core.model.boxes import Box, Shape, joined, replace, whole
from l4core.model.config import ModelConfig
from l4core.model.layout import Parameter, Part
from l4core.quant.formats import GROUP, INT4


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One copy: target[target_box] = source[source_box], its two dimensions swapped where `transpose`.

    source: checkpoint name in full.  The target box of one expert has the expert's index as a range of one in front.
    """

    source: str
    source_box: Box
    target_box: Box
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShare:
    """What one rank holds of the routed experts: those in [first, first + count), each cut into `world` parts of which it has part `rank`."""

    first: int
    count: int
    rank: int
    world: int


def expert_share(num_experts: int, rank: int, world: int, ep: int) -> ExpertShare:
    """Of rank `rank` among `world`. ep: expert-parallel groups of world / ep neighbouring ranks; a group holds num_experts / ep experts."""
    cut, count = world // ep, num_experts // ep
    return ExpertShare(first=rank // cut * count, count=count, rank=rank % cut, world=cut)


def check_world(config: ModelConfig, world: int, ep: int = 1) -> None:
    """Raises ConfigError naming the sizes that work when `world` ranks, in `ep` groups for the experts, cannot share this model evenly."""
    if world < 1 or not _divides(config, world):
        usable = [str(n) for n in range(1, config.num_q_heads + 1) if _divides(config, n)]
        raise ConfigError(
            f"{world} tensor-parallel ranks cannot share {config.num_q_heads} query heads, {config.num_kv_heads} KV heads, "
            f"intermediate size {config.intermediate_size} and vocabulary {config.vocab_size} evenly",
            fix=f"--tp {', '.join(usable)}",
        )
    if ep < 1 or world % ep or config.num_experts % ep:
        usable = [str(n) for n in range(1, world + 1) if not (world % n or config.num_experts % n)]
        raise ConfigError(
            f"{ep} expert-parallel groups cannot share {world} ranks and {config.num_experts} experts evenly",
            fix=f"--ep {', '.join(usable)}",
        )


def check_groups(of: Iterable[Parameter], formats: Mapping[str, str], world: int, ep: int = 1) -> None:
    """Raises ConfigError where ranks would cut a group of 4-bit weights that share a scale. formats: parameter name → format."""
    for parameter in of:
        parts, inputs = world // (ep if parameter.routed else 1), parameter.parts[0].size
        if parts > 1 and formats.get(parameter.name) == INT4 and parameter.cut_on_inputs and inputs % (parts * GROUP):
            usable = [str(n) for n in range(1, parts) if inputs % (n * GROUP) == 0]
            raise ConfigError(
                f"{parts} ranks cannot share the {inputs} inputs of {parameter.name} evenly: {GROUP} of them have one int4 scale",
                fix=f"--tp {', '.join(usable)}" if usable else "--quantization fp8, or --tp 1",
            )


def _divides(config: ModelConfig, world: int) -> bool:
    sizes = [config.num_q_heads, config.vocab_size, config.intermediate_size]
    sizes += [] if all(config.moe_layers) else [config.intermediate_size_mlp]
    kv_even = config.num_kv_heads % world == 0 or world % config.num_kv_heads == 0
    return kv_even and all(size % world == 0 for size in sizes)


def rank_config(config: ModelConfig, world: int) -> ModelConfig:
    """The model that one of `world` ranks is by itself: a whole model whose every parameter has the rank's shape (all ranks have the same).

    Without the sums over ranks it computes nothing of use, but it takes a rank's time and memory. Routed experts are those of a rank without expert
    parallelism; with it, `expert_share` has them. Raises ConfigError as `check_world` does.
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


def rank_shape(parameter: Parameter, rank: int, world: int, ep: int = 1) -> Shape:
    """Shape of a rank's share of the parameter."""
    cut = _Cut.of(parameter, rank, world, ep)
    of_one_expert = (part for part in parameter.parts if part.expert == parameter.parts[0].expert)
    stacked = sum(_stacked(part, cut.source_box(part), parameter.stack) for part in of_one_expert)
    shape = (*parameter.shape[: parameter.stack], stacked, *parameter.shape[parameter.stack + 1 :])
    return (cut.num_experts, *shape[1:]) if parameter.routed else shape


def regions(parameter: Parameter, rank: int, world: int, names: Mapping[str, str], ep: int = 1) -> list[Region]:
    """All copies that make up a rank's share. Two copies that lie side by side in both tensors are one (fused gate and up at world 1).

    names: source without prefix → full name; parts whose source is not in it are left out.
    """
    made: list[Region] = []
    cut = _Cut.of(parameter, rank, world, ep)
    shape = whole(rank_shape(parameter, rank, world, ep))
    position, expert = 0, None
    for part in parameter.parts:
        if not cut.holds(part):
            continue
        if part.expert != expert:
            position, expert = 0, part.expert
        source = cut.source_box(part)
        size = _stacked(part, source, parameter.stack)
        target = replace(shape, parameter.stack, (position, position + size))
        if expert is not None:
            target = replace(target, 0, (expert - cut.first_expert, expert - cut.first_expert + 1))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """How one parameter is cut for one rank: into `world` parts of which it takes part `rank`, of experts [first_expert, first_expert +
    num_experts) where the parameter is of routed ones."""

    rank: int
    world: int
    first_expert: int = 0
    num_experts: int = 0

    @classmethod
    def of(cls, parameter: Parameter, rank: int, world: int, ep: int) -> _Cut:
        if not parameter.routed:
            return cls(rank=rank, world=world)
        share = expert_share(parameter.shape[0], rank, world, ep)
        return cls(rank=share.rank, world=share.world, first_expert=share.first, num_experts=share.count)

    def holds(self, part: Part) -> bool:
        """Whether the rank takes anything of this part."""
        return not self.num_experts or part.expert is None or 0 <= part.expert - self.first_expert < self.num_experts

    def source_box(self, part: Part) -> Box:
        box = whole(part.shape)
        if self.num_experts and part.expert is None:  # experts side by side in one tensor
            box = replace(box, 0, (self.first_expert, self.first_expert + self.num_experts))
        if part.split is None:
            return box
        units = part.size // part.unit
        if part.shared and units < self.world:
            low = self.rank * units // self.world
            high = low + 1
        else:
            low, high = units * self.rank // self.world, units * (self.rank + 1) // self.world
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
