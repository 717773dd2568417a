"""From a list of stored tensors to the exact copies one rank makes. Torch-free, so a 400B checkpoint is planned in a second.

A plan says for every parameter its shape, its dtype and the regions that fill it; what is wrong is listed, never guessed around.
Vision tensors are known and skipped (image input is not built yet); a head stored beside a tied embedding is skipped too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from l4core.errors import CheckpointError
from l4core.model.boxes import Shape
from l4core.model.config import ModelConfig
from l4core.model.layout import Parameter, parameters
from l4core.model.layout_quant import COMPRESSED_INT4, kv_scales, packed, scale_name, scales, scheme_of
from l4core.model.safetensors_index import ITEM_SIZES, Problem, StoredTensor
from l4core.model.slicing import Region, check_groups, check_world, rank_shape, regions
from l4core.quant import formats

VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
TEXT_PREFIXES = ("language_model.model.", "model.")
HEAD_NAMES = {"language_model.lm_head.": "lm_head.", "lm_head.": "lm_head."}

PLAIN, FP8, SCALE, WORDS = ("BF16", "F16", "F32"), ("F8_E4M3",), ("F32", "BF16", "F16"), ("I32",)
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "int32": "I32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parameter of a rank. dtype: torch's name, as stored (the loader converts plain weights).  regions: sources by their full names.
    routed, cut_on_inputs: as in layout.Parameter."""

    name: str
    shape: Shape
    dtype: str
    regions: tuple[Region, ...]
    routed: bool = False
    cut_on_inputs: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[STORED_AS[self.dtype]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """scheme: quantisation, None = plain.  formats: weights that are not plain → their format (quant.formats).  used, vision, tied: full checkpoint
    names.  kv_scales: of the used ones, those that are no weight's but the KV cache's (model.kv_scales reads them).  problems: empty iff every
    tensor has its place."""

    rank: int
    world: int
    scheme: str | None
    formats: Mapping[str, str]
    targets: tuple[Target, ...]
    used: frozenset[str]
    vision: tuple[str, ...]
    tied: tuple[str, ...]
    problems: tuple[Problem, ...]
    kv_scales: frozenset[str] = frozenset()

    @property
    def num_bytes(self) -> int:
        """What the rank's parameters take in the checkpoint's dtypes."""
        return sum(target.num_bytes for target in self.targets)


def plan_weights(
    stored: Mapping[str, StoredTensor], config: ModelConfig, *, rank: int = 0, world: int = 1, ep: int = 1
) -> WeightPlan:
    """Plans one rank's copies. stored: every tensor of the checkpoint by its full name.  ep: groups of ranks for the experts (slicing.expert_share).

    Raises CheckpointError for a dtype that none computes in, ConfigError when `world` ranks cannot share the model, NotBuiltError for a
    quantisation whose layout is not known.
    """
    check_world(config, world, ep)
    if config.dtype not in COMPUTE_DTYPES:
        raise CheckpointError(f"config.json: dtype is {config.dtype!r}; wanted {' or '.join(COMPUTE_DTYPES)}")
    scheme = scheme_of(config.quantization_config)
    names = _Names(stored)
    planner = _Planner(config, names, rank, world, ep, scheme)
    for parameter in parameters(config, names.text):
        planner.add_weight(parameter)
    check_groups(parameters(config, names.text), planner.formats, world, ep)
    scales_of_kv = list(kv_scales(config, names.text)) if config.quantization_config else []
    for parameter in scales_of_kv:
        planner.check(parameter, SCALE)
    if scheme is not None:
        planner.require_scales(scheme)
    tied = tuple(name for name in names.tied(config) if name not in planner.used)
    unknown = sorted(set(stored) - planner.used - set(names.vision) - set(tied) - names.doubled)
    problems = [*names.problems, *planner.problems, *(_unknown(name, scheme) for name in unknown)]
    return WeightPlan(
        rank=rank,
        world=world,
        scheme=scheme,
        formats=planner.formats,
        targets=tuple(planner.targets),
        used=frozenset(planner.used),
        vision=tuple(names.vision),
        tied=tied,
        problems=tuple(problems),
        kv_scales=frozenset(planner.names[part.source] for parameter in scales_of_kv for part in parameter.parts),
    )


class _Names:
    """Stored names sorted by what they are: text (by the name without prefix), vision, and one name under both prefixes."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.text: dict[str, StoredTensor] = {}
        self.vision: list[str] = []
        self.doubled: set[str] = set()
        self.problems: list[Problem] = []
        for name, tensor in stored.items():
            short = short_name(name)
            if name.startswith(VISION_PREFIXES):
                self.vision.append(name)
            elif short in self.text:
                self.doubled.add(name)
                other = self.text[short].name
                self.problems.append(
                    Problem(kind="duplicate", name=name, text=f"{name} and {other} are the same weight, stored twice")
                )
            elif short is not None:
                self.text[short] = tensor

    def tied(self, config: ModelConfig) -> Iterable[str]:
        if config.tie_word_embeddings and "lm_head.weight" in self.text:
            yield self.text["lm_head.weight"].name


def short_name(name: str) -> str | None:
    """A text tensor's name without its prefix, None for any other tensor."""
    for prefix in TEXT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    for prefix, short in HEAD_NAMES.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return None


class _Planner:
    """Collects targets and problems of one rank."""

    def __init__(self, config: ModelConfig, names: _Names, rank: int, world: int, ep: int, scheme: str | None) -> None:
        self.config, self.stored, self.scheme = config, names.text, scheme
        self.rank, self.world, self.ep = rank, world, ep
        self.names = {short: tensor.name for short, tensor in names.text.items()}
        self.prefixes = _prefixes_in_use(names.text)
        self.targets: list[Target] = []
        self.used: set[str] = set()
        self.problems: list[Problem] = []
        self.formats: dict[str, str] = {}

    def add_weight(self, parameter: Parameter) -> None:
        if self.scheme == COMPRESSED_INT4:
            self._add_packed(parameter)
        else:
            self._add_scaled(parameter)

    def _add_packed(self, parameter: Parameter) -> None:
        found = packed(parameter, self.stored)
        if found is None:
            self.add(parameter, self.config.dtype, PLAIN)
            return
        self.formats[parameter.name] = formats.INT4
        words, scale = found
        self.add(words, "int32", WORDS)
        self.add(scale, "float32", SCALE)
        for part in parameter.parts:  # two numbers that say what the config says already
            shape = self.stored.get(f"{part.source}_shape")
            if shape is not None:
                self.used.add(shape.name)

    def _add_scaled(self, parameter: Parameter) -> None:
        extra = scales(parameter, self.stored) if self.scheme else []
        is_fp8 = self.scheme is not None and any(self._dtype(part.source) in FP8 for part in parameter.parts)
        if is_fp8 and not any(scale.name.endswith("weight_scale") for scale in extra):
            weight = parameter.parts[0].source
            name = self._full(scale_name(weight, "weight_scale"))
            self._fail("missing", name, f"{name} is missing: {self._full(weight)} is FP8 and has no scale")
        if extra or is_fp8:
            self.formats[parameter.name] = formats.FP8
            self.add(parameter, "float8_e4m3fn", FP8)
        else:
            self.add(parameter, self.config.dtype, PLAIN)
        for scale in extra:
            self.add(scale, "float32", SCALE)

    def check(self, parameter: Parameter, accepted: tuple[str, ...]) -> None:
        """Its sources are there as they should be."""
        for part in {part.source: part for part in parameter.parts}.values():
            self._check(part.source, part.shape, accepted)

    def add(self, parameter: Parameter, dtype: str, accepted: tuple[str, ...]) -> None:
        self.check(parameter, accepted)
        here = tuple(regions(parameter, self.rank, self.world, self.names, self.ep))
        shape = rank_shape(parameter, self.rank, self.world, self.ep)
        self.targets.append(
            Target(
                name=parameter.name,
                shape=shape,
                dtype=dtype,
                regions=here,
                routed=parameter.routed,
                cut_on_inputs=parameter.cut_on_inputs,
            )
        )

    def require_scales(self, scheme: str) -> None:
        if not self.formats and not self.problems:
            self._fail(
                "quantisation", "config.json", f"config.json says {scheme}, but no tensor of the checkpoint has a scale"
            )

    def _check(self, source: str, shape: Shape, accepted: tuple[str, ...]) -> None:
        tensor = self.stored.get(source)
        if tensor is None:
            name = self._full(source)
            self._fail("missing", name, f"{name} is missing; wanted {list(shape)}")
            return
        self.used.add(tensor.name)
        if tensor.shape != shape and not (shape == (1,) and tensor.shape == ()):
            self._fail("shape", tensor.name, f"{tensor.name} is {list(tensor.shape)}; wanted {list(shape)}")
        if tensor.dtype not in accepted:
            wanted = " or ".join(accepted)
            self._fail("dtype", tensor.name, f"{tensor.name} is {tensor.dtype}; wanted {wanted}")

    def _fail(self, kind: str, name: str, text: str) -> None:
        self.problems.append(Problem(kind=kind, name=name, text=text))

    def _dtype(self, source: str) -> str | None:
        tensor = self.stored.get(source)
        return tensor.dtype if tensor is not None else None

    def _full(self, source: str) -> str:
        head = source.startswith("lm_head.")
        return f"{self.prefixes[1] if head else self.prefixes[0]}{source}"


def _prefixes_in_use(text: Mapping[str, StoredTensor]) -> tuple[str, str]:
    """(prefix of layers, prefix of the head) as this checkpoint writes them, so that a missing name is spelled like its neighbours."""
    wrapped = any(tensor.name.startswith("language_model.") for tensor in text.values())
    return ("language_model.model.", "language_model.") if wrapped else ("model.", "")


def _unknown(name: str, scheme: str | None) -> Problem:
    hint = "" if scheme or not name.endswith("scale") else " (a scale, but config.json has no quantization_config)"
    return Problem(kind="unknown", name=name, text=f"{name} is no weight of this model{hint}")
