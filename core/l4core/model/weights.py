"""Weights from safetensors shards straight into the model's parameters, or seeded random ones.

Each region of the plan is mapped from its file in pieces of at most 32 MB and copied into place, dtype conversion and transposition
included (on a GPU from pinned memory, by the GPU); a piece's pages leave the process with its mapping. So a load takes no memory but the parameters
and a few pieces, and under tensor parallelism a rank touches only the pages it needs. Files are never unpickled and no code of a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm import tqdm

from l4core.errors import CheckpointError
from l4core.model.boxes import Box, extent, pieces, span, strides, tiles, volume, whole
from l4core.model.config import ModelConfig
from l4core.model.layout_quant import WEIGHT_SCALE, scale_name, with_folder_scheme
from l4core.model.safetensors_index import ITEM_SIZES, FolderIndex, Problem, StoredTensor, read_folder
from l4core.model.slicing import Region, rank_config
from l4core.model.staging import Staging
from l4core.model.weight_plan import Target, WeightPlan, plan_weights
from l4core.model.weights_quant import Quantising, split_plan
from l4core.parallel.ranks import ALONE, Ranks
from l4core.quant.formats import PLAIN

PIECE_BYTES = 32 << 20
NUM_WORKERS = min(8, os.cpu_count() or 1)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32}
DUMMY_STD = 0.02
DUMMY_FP8_SCALE = 2.0**-10
INT4_STD = 85**0.5 / 2
"""Standard deviation of the whole numbers −8 … 7."""
DUMMY_PERIOD = (1 << 22) - 3
"""Prime, so that rows and experts differ; a 100B model is filled in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """num_tensors: checkpoint tensors read.  bytes_read: from the shards, by this rank.  num_vision, num_tied: tensors known and skipped."""

    num_tensors: int
    bytes_read: int
    num_vision: int
    num_tied: int

    def text(self) -> str:
        """One line for the start-up block."""
        line = f"{self.num_tensors} tensors, {self.bytes_read / 1e9:.2f} GB read"
        if self.num_vision:
            line += f"; {self.num_vision} vision tensors skipped (image input is not built yet)"
        return line + (f"; {self.num_tied} skipped (the head is tied to the embedding)" if self.num_tied else "")


def load_weights(
    model_params: Mapping[str, torch.Tensor],
    folder: Path,
    config: ModelConfig,
    *,
    ranks: Ranks = ALONE,
    ep: int = 1,
    progress: bool = True,
    formats: Mapping[str, str] = MappingProxyType({}),
) -> LoadReport:
    """Fills every parameter of the model from the shards in `folder`. progress: a bar in bytes on stderr.

    model_params: by our names, this rank's shapes, any device and any of float64, float32, bfloat16, float16 (values are converted).
    ranks: those that share the model, in `ep` groups for the experts (slicing.expert_share); all of them load at once.
    formats: weights of the model that are kept in fewer bits → format; their scales are called like them, with `weight_scale`. Weights that are
    plain in the checkpoint are quantised one matrix at a time, those that are not must have the format already.
    Raises CheckpointError naming the tensor or shard at fault; then no parameter was written.
    """
    config = with_folder_scheme(config, folder)
    index = read_folder(folder)
    plan = plan_weights(index.tensors, config, rank=ranks.rank, world=ranks.size, ep=ep)
    raise_problems(folder, [*index.problems, *plan.problems])
    straight, rest = split_plan(plan, model_params)
    _check_formats(plan, formats)
    _check_params(plan, straight, rest, formats, model_params)
    quantising = Quantising(formats, rank_config(config, ranks.size), ranks, ep)
    bytes_read = _copy_all(straight, rest, index, model_params, quantising, progress=progress)
    return LoadReport(
        num_tensors=len(plan.used), bytes_read=bytes_read, num_vision=len(plan.vision), num_tied=len(plan.tied)
    )


def raise_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """One CheckpointError that names the first few problems, none when there are none."""
    if problems:
        shown = "\n  ".join(problem.text for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit the model:\n  {shown}{more}", fix=f"l4 check {folder} lists everything"
        )


def _check_formats(plan: WeightPlan, formats: Mapping[str, str]) -> None:
    for name, kept in plan.formats.items():
        if formats.get(name) != kept:
            raise CheckpointError(
                f"parameter {name} is {kept} in the checkpoint ({plan.scheme}) and {formats.get(name, PLAIN)} in the model"
            )


def _check_params(
    plan: WeightPlan,
    straight: WeightPlan,
    rest: Sequence[Target],
    formats: Mapping[str, str],
    model_params: Mapping[str, torch.Tensor],
) -> None:
    """The plan and the model agree, and the plan writes every element of every parameter exactly once."""
    planned = {target.name: target for target in straight.targets}
    changed = {n for name in formats for n in (name, scale_name(name, WEIGHT_SCALE)) if n not in planned}
    if not formats:
        planned |= {target.name: target for target in rest}
    for name in sorted((planned.keys() | changed) ^ model_params.keys()):
        side = "the model" if name in model_params else "the checkpoint layout"
        raise CheckpointError(f"parameter {name} is known to {side} only")
    for name, param in model_params.items():
        if param.is_meta or param.dtype not in (*DTYPES.values(), torch.float64, torch.float8_e4m3fn, torch.int16):
            raise CheckpointError(
                f"parameter {name} is {param.dtype} on {param.device}; wanted real memory in a float type"
            )
        if name in planned and tuple(param.shape) != planned[name].shape:
            raise CheckpointError(
                f"parameter {name} is {list(param.shape)}; rank {plan.rank} wants {list(planned[name].shape)}"
            )
    for target in (*straight.targets, *rest):
        if not tiles((region.target_box for region in target.regions), target.shape):
            raise CheckpointError(
                f"parameter {target.name}: its regions do not cover {list(target.shape)} exactly once"
            )


def _copy_all(
    straight: WeightPlan,
    rest: Sequence[Target],
    index: FolderIndex,
    model_params: Mapping[str, torch.Tensor],
    quantising: Quantising,
    *,
    progress: bool,
) -> int:
    jobs = [(target.name, region) for target in straight.targets for region in target.regions]
    jobs.sort(key=lambda job: (index.tensors[job[1].source].shard, index.tensors[job[1].source].start))
    regions = [region for _, region in jobs] + [region for target in rest for region in target.regions]
    total = sum(volume(region.source_box) * ITEM_SIZES[index.tensors[region.source].dtype] for region in regions)
    with ExitStack() as stack:
        files = {shard: stack.enter_context(FileIO(index.folder / shard)) for shard in index.shards}
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=not progress, file=sys.stderr)
        )
        staging = Staging(PIECE_BYTES)
        calls = (
            call
            for name, region in jobs
            for call in _pieces(model_params[name], region, index.tensors[region.source], files, staging)
        )
        copied = _run(calls, bar.update)
        for change in quantising.changes(rest, model_params):
            calls = (
                call
                for place, its_regions in change.sources
                for region in its_regions
                for call in _pieces(place, region, index.tensors[region.source], files, staging)
            )
            copied += _run(calls, bar.update)
            change.finish()
    if copied != total:
        raise CheckpointError(f"{copied} bytes of {total} were copied from {index.folder}")
    return total


def _pieces(
    param: torch.Tensor, region: Region, tensor: StoredTensor, files: Mapping[str, FileIO], staging: Staging
) -> Iterator[Callable[[], int]]:
    """Copies of at most PIECE_BYTES each; a call returns the bytes it read."""
    place = place_of(param.detach(), region)
    item = ITEM_SIZES[tensor.dtype]
    for box in pieces(region.source_box, tensor.shape or (1,), PIECE_BYTES // item):
        here = tuple(
            slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, region.source_box, strict=True)
        )

        def call(box: Box = box, here: tuple[slice, ...] = here) -> int:
            stored = _map(files[tensor.shard], tensor, box)
            if not place.is_cpu:
                staging.copy(stored, place[here])
            else:  # a transpose into fresh memory is blocked and three times as fast as one into rows that lie apart
                place[here].copy_(stored.t().contiguous().t() if region.transpose else stored)
            return volume(box) * item

        yield call


def place_of(param: torch.Tensor, region: Region) -> torch.Tensor:
    """View of the parameter that receives the region, its dimensions in the order of the region's source."""
    view = param[tuple(slice(start, stop) for start, stop in region.target_box)]
    if view.dim() > len(region.source_box):
        view = view[0]
    return view.transpose(0, 1) if region.transpose else view


def _map(file: FileIO, tensor: StoredTensor, box: Box) -> torch.Tensor:
    """The box as a view of file pages; they are unmapped when the view dies. Copy-on-write only because torch wants writable buffers."""
    item = ITEM_SIZES[tensor.dtype]
    shape = tensor.shape or (1,)
    first, last = span(box, shape)
    begin, end = tensor.start + first * item, tensor.start + last * item
    base = begin - begin % mmap.ALLOCATIONGRANULARITY
    memory = mmap.mmap(file.fileno(), end - base, access=mmap.ACCESS_COPY, offset=base)
    flat = torch.frombuffer(memory, dtype=STORED[tensor.dtype], count=last - first, offset=begin - base)
    return flat.as_strided(extent(box), strides(shape))


def _run(calls: Iterable[Callable[[], int]], advance: Callable[[int], object]) -> int:
    """Runs the calls on a few threads (copies release the interpreter lock); the sum of what they return. The first error ends it."""
    done = 0
    with ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="l4-weights") as pool:
        try:
            for future in as_completed([pool.submit(call) for call in calls]):
                advance(future.result())
                done += future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return done


def fill_dummy(model_params: Mapping[str, torch.Tensor], seed: int, rank: int = 0) -> None:
    """Random weights of standard deviation 0.02, norms = 1. A tensor's values follow from the seed and its name alone: they are drawn in float32 on
    the CPU, so every device and, up to rounding, every dtype gets the same model. Beyond DUMMY_PERIOD elements they repeat. Weights in fewer bits
    are drawn as they are kept, with scales of one size. rank: of several; each has values of its own but for the router, which is the same on all."""
    _run((_dummy_call(name, param.detach(), seed, rank) for name, param in model_params.items()), lambda _: None)


def _dummy_call(name: str, param: torch.Tensor, seed: int, rank: int) -> Callable[[], int]:
    def call() -> int:
        if name.endswith("norm.weight"):
            param.fill_(1.0)
            return param.numel()
        is_scale = name.endswith("weight_scale")
        if is_scale and param.dtype == torch.float32:
            param.fill_(DUMMY_FP8_SCALE)
            return param.numel()
        label = f"{seed}:{name}" if rank == 0 or name.endswith("router.weight") else f"{seed}:{name}:{rank}"
        digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        draw = _draw_int4_scales if is_scale else _draw
        drawn = draw(min(param.numel(), DUMMY_PERIOD), param.dtype, generator).to(param.device)
        twice = torch.cat((drawn, drawn))  # a piece that begins anywhere in the period
        first = 0
        for box in pieces(whole(tuple(param.shape)), tuple(param.shape), DUMMY_PERIOD):
            size = volume(box)
            here = tuple(slice(start, stop) for start, stop in box)
            param[here].copy_(twice[first : first + size].view(extent(box)))
            first = (first + size) % DUMMY_PERIOD
        return param.numel()

    return call


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.int16:  # four 4-bit weights
        return torch.randint(-(1 << 15), 1 << 15, (count,), dtype=dtype, generator=generator)
    drawn = torch.empty(count, dtype=torch.float32, device="cpu").normal_(std=DUMMY_STD, generator=generator)
    return (drawn / DUMMY_FP8_SCALE).to(dtype) if dtype == torch.float8_e4m3fn else drawn


def _draw_int4_scales(count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Of either sign: −8 … 7 lie about −½, and layers of weights with a mean turn every token the same way, to the same few experts."""
    signs = torch.randint(0, 2, (count,), dtype=dtype, generator=generator) * 2 - 1
    return signs * (DUMMY_STD / INT4_STD)
