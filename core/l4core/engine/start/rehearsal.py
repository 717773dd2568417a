"""The steps of a start over tensors that have shapes, strides and a device but no memory: they show which kernels an engine will launch, with which
arguments, before one of them is compiled. Nothing is computed and nothing real is touched. Knows nothing of compilers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from l4core.engine.batch import ScheduledBatch, ScheduledSequence
from l4core.engine.run.fixed_step import StepOutputs, StepShape
from l4core.engine.run.runner import Runner
from l4core.model.llama4 import Layer, Llama4
from l4core.parallel.ranks import Ranks
from l4core.plugin_api import (
    AttentionBackend,
    AttentionMetadata,
    ExpertKernel,
    ExpertWeights,
    KVView,
    Plan,
)
from l4core.request import Request, SamplingParams

ADDRESS = 1 << 20
"""Where memory begins that was never given out: every device's allocator aligns to more than kernels look at."""
FEW, UNIT = 3, 16
"""Sequences of a step with several. One, a multiple of 16 and any other number are what kernels tell apart."""
SHORT = (5, 129)
"""Lengths of many prompts at once: rows that a kernel for few and one for many takes."""


class WithoutMemory(TorchFunctionMode):
    """In here what is asked for on `device` is made on torch's meta device, which computes shapes only, and passes for a tensor of `device` whose
    memory is aligned as its allocator does. Real tensors stay as they are; they may be arguments of kernels, not of torch's operations."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED and args[0].is_meta:
            return _ASKED[func](args[0], self._device)
        if func is torch.Tensor.copy_ and args[1].is_meta and not args[0].is_meta:
            return args[0]  # a download: there is nothing to bring
        if "device" in kwargs:
            kwargs["device"] = self._meant(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return func(*map(self._meant, args), **kwargs)

    def _meant(self, x: Any) -> Any:
        is_device = isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] == self._device.type)
        return META if is_device and torch.device(x).type == self._device.type else x


META = torch.device("meta")
_ASKED: Mapping[Any, Callable[[torch.Tensor, torch.device], Any]] = {
    torch.Tensor.device.__get__: lambda tensor, device: device,
    torch.Tensor.is_cuda.__get__: lambda tensor, device: device.type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_xpu.__get__: lambda tensor, device: device.type == "xpu",  # type: ignore[attr-defined]
    torch.Tensor.data_ptr: lambda tensor, device: ADDRESS + tensor.storage_offset() * tensor.element_size(),
}
"""What is answered in place of a tensor on the meta device."""


class NoAttention(AttentionBackend):
    """In the place of a backend that does not say `without_memory`."""

    def plan(self, meta: AttentionMetadata) -> Plan:
        return None

    def attend(self, q: torch.Tensor, kv: KVView, plan: Plan, out: torch.Tensor) -> None:
        pass


class NoExperts(ExpertKernel):
    """The same for kernels of experts."""

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        return torch.empty_like(x)


class SilentRanks(Ranks):
    """In the place of one rank among others, whom no call reaches."""

    def __init__(self, like: Ranks) -> None:
        super().__init__()
        self.rank, self.size = like.rank, like.size

    def _sum(self, x: torch.Tensor) -> None:
        pass

    def _gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        pass


def one_layer_of_each_kind(model: Llama4) -> Llama4:
    """Drops layers that launch what another one launches. In place; those that stay keep their ids."""
    kinds = dict[Any, nn.Module]()
    for layer in model.layers:
        assert isinstance(layer, Layer)
        weights = tuple((name, p.dtype, p.shape, p.stride()) for name, p in layer.named_parameters())
        kinds.setdefault((layer.attn.rule, weights), layer)
    model.layers = nn.ModuleList(kinds.values())
    return model


def rehearse(runner: Runner, shapes: Sequence[StepShape], batches: Iterable[ScheduledBatch]) -> None:
    """runner: made without memory.  shapes: of steps that will be captured. Prompts come first: their kernels take a compiler longest."""
    for batch in batches:
        forward = runner.build(batch)
        parsed = {seq.request.request_id: runner.pipeline.check(seq.request.params) for seq in batch.sequences}
        runner.draw(batch, forward, runner.execute(forward), parsed)
    if shapes:
        outputs = StepOutputs(max(s.num_seqs * s.num_tokens for s in shapes), runner.model, runner.pending.device)
        for shape in sorted(shapes, reverse=True):
            runner.fixed_step(shape, outputs).run()


def first_batches(max_tokens: int, max_running: int, chunk_size: int | None) -> Iterator[ScheduledBatch]:
    """max_tokens: of a step.  chunk_size: of local layers; a piece of a prompt lies in one chunk.

    One prompt of every order of length, longest first: a power of two, and a number that is no multiple of anything. A few prompts at once, many, and
    one behind decodes."""
    longest = min(max_tokens, chunk_size or max_tokens)
    powers = [1 << power for power in range(longest.bit_length())]
    for length in reversed(powers):
        yield _batch([length])
        if length < longest:
            yield _batch([length + 1])
    if max_running > FEW:
        several = max(power for power in powers if FEW * power <= max_tokens)
        yield _batch([several] * FEW)
        yield _batch([several + 1], num_decodes=FEW)
        if max_running > UNIT:
            yield _batch([several + 2], num_decodes=UNIT - 1)
            yield from (_batch([n] * (UNIT + 1)) for n in SHORT if n * (UNIT + 1) <= max_tokens)


def _batch(lengths: Sequence[int], num_decodes: int = 0) -> ScheduledBatch:
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=1, ignore_eos=True)
    sequences = [
        ScheduledSequence(
            request=Request(
                request_id=str(row),
                prompt_token_ids=[0] * length,
                params=params,
                eos_token_ids=(),
                max_total_tokens=length + 1,
            ),
            row=row,
            start=int(row < num_decodes),
            token_ids=[0] * length,
            new_pages={},
            draws=True,
            is_decode=row < num_decodes,
        )
        for row, length in enumerate([1] * num_decodes + list(lengths))
    ]
    return ScheduledBatch(step=0, sequences=sequences)
