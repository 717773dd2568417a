"""Which variants of its Triton kernels a serving engine would have compiled, and when: in the rehearsal that shows what to compile ahead, when graphs
are captured, or in front of waiting requests.

    python tests/engine/kernel_variants_script.py [--prompts 131072,131072] [--steps 500]

The whole engine in Scout's shape (scheduler, KV, runner, model, l4-triton) runs on torch's meta device, whose tensors have shapes, strides and
offsets but no memory. A launch does nothing but note the key by which Triton tells variants apart: constants, argument types, which numbers are 1 or
multiples of 16, which memory begins at a multiple of 16 bytes. So neither a GPU nor a compiler is needed; that CUDA's allocator aligns what it gives
out is taken for granted. Drawn tokens are 0.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

import l4core.platform

l4core.platform.has_triton = lambda device_type: device_type in ("meta", "cuda")  # type: ignore[assignment]  # before it is imported by name
torch.Tensor.is_cuda = property(lambda self: self.is_meta)  # type: ignore[assignment,method-assign]

import l4core.engine.run.runner  # noqa: E402
import l4core.ops.overlap_triton  # noqa: E402
import l4core.ops.skinny_triton  # noqa: E402
from l4_triton import launch  # noqa: E402
from l4_triton.backend import TritonBackend  # noqa: E402
from l4_triton.tiles import tiles_for as attention_tiles  # noqa: E402
from l4core.engine.engine import Engine  # noqa: E402
from l4core.engine.inbox import Inbox  # noqa: E402
from l4core.engine.run.fixed_step import Computed, FixedStep, StepOutputs, StepShape  # noqa: E402
from l4core.engine.run.runner import Runner  # noqa: E402
from l4core.engine.schedule.scheduler import Scheduler, SchedulerLimits  # noqa: E402
from l4core.engine.schedule.step_costs import StepCosts  # noqa: E402
from l4core.engine.start.capacity import load_config  # noqa: E402
from l4core.engine.start.graph_sizes import batch_sizes  # noqa: E402
from l4core.engine.start.rehearsal import WithoutMemory, first_batches, one_layer_of_each_kind, rehearse  # noqa: E402
from l4core.experts.fused import TritonExperts  # noqa: E402
from l4core.experts.tiles import tiles_for as expert_tiles  # noqa: E402
from l4core.kv.manager import KVManager  # noqa: E402
from l4core.kv.memory import KVMemory  # noqa: E402
from l4core.kv.planner import KVPlan, plan_kv  # noqa: E402
from l4core.model.config import ModelConfig  # noqa: E402
from l4core.model.llama4 import Llama4  # noqa: E402
from l4core.plugin_api import AttentionContext, AttentionRequirements, Platform  # noqa: E402
from l4core.request import Request, SamplingParams  # noqa: E402
from l4core.sampling.default import DefaultSampler  # noqa: E402
from l4core.sampling.pipeline import SamplingPipeline  # noqa: E402

LAYERS = 4
"""The last ones: three local, one global."""
RUNNING, PAGE, PROCESSORS, MAX_TOKENS = 48, 64, 132, 8192
SHAPES = [StepShape(n, 1) for n in batch_sizes(RUNNING)]
CARD = Platform(device_type="cuda", vendor="nvidia", arch="sm90", memory_bytes=141 * 10**9)
BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))


class Pointer:
    """What Triton looks at of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = 256 + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 1 << 40


class Launches:
    """Variants by kernel. silent: launches are those of a captured graph, which compile nothing."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], str] = {}
        self.silent = False

    def note(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """In place of JITFunction.run."""
        if self.silent:
            return
        values = {name: _stub(x) for name, x in options.items()}
        bound, specialization, rest = _binder(kernel)(*map(_stub, args), **values)
        pairs = zip(bound.items(), specialization, strict=True)
        arguments = tuple((name, kind, str(x if kind == "constexpr" else extra)) for (name, x), (kind, extra) in pairs)
        key = (kernel, *arguments, *sorted((name, str(x)) for name, x in rest.items()))
        self.seen.setdefault(key, f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")


@cache
def _binder(kernel: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, BACKEND)


def _stub(x: Any) -> Any:
    return Pointer(x) if isinstance(x, torch.Tensor) else x


class Arrived:
    """In place of Download: memory that does not exist cannot be read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)

    def wait(self) -> torch.Tensor:
        return self._zeros


class Replayed:
    """In place of Graphs: each step is run once, as a capture does."""

    def __init__(self, runner: Runner, shapes: Iterable[StepShape], launches: Launches) -> None:
        outputs = StepOutputs(RUNNING, runner.model, torch.device("meta"))
        self._launches = launches
        self._steps = {shape.num_seqs: runner.fixed_step(shape, outputs) for shape in shapes}
        for step in self._steps.values():
            step.run()

    def find(self, num_seqs: int, num_tokens: int) -> FixedStep | None:
        size = min((size for size in self._steps if size >= num_seqs), default=None)
        return None if size is None or num_tokens > 1 else self._steps[size]

    def replay(self, step: FixedStep) -> Computed:
        self._launches.silent = True
        computed = step.run()
        self._launches.silent = False
        return computed


def scout() -> ModelConfig:
    whole = load_config("scout")
    cut = {name: getattr(whole, name)[-LAYERS:] for name in ("moe_layers", "rope_layers", "chunked_layers")}
    return replace(whole, num_layers=LAYERS, **cut)


def make_runner(context: int, device: torch.device) -> tuple[Runner, KVPlan]:
    """device: meta, or cuda within rehearsal.WithoutMemory."""
    config, dtype = scout(), torch.bfloat16
    name, heads = "bfloat16", {"num_kv_heads": config.num_kv_heads}
    tiles = expert_tiles(CARD.arch, config.num_experts, config.hidden_size, config.intermediate_size, name)
    with torch.device("meta"):
        model = Llama4(config, max_positions=context, experts=TritonExperts(tiles)).to(dtype).requires_grad_(False)
    groups = config.kv_groups()
    plan = plan_kv(
        groups,
        page_size=PAGE,
        head_dim=config.head_dim,
        bytes_per_element=dtype.itemsize,
        budget_bytes=60 * 10**9,
        context_length=context,
        model_limit=config.max_position_embeddings,
        max_running=RUNNING,
        max_total_tokens=None,
        **heads,
    )
    requirements = AttentionRequirements(
        num_q_heads=config.num_q_heads,
        head_dim=config.head_dim,
        q_dtype=name,
        kv_dtype=name,
        page_size=PAGE,
        chunk_size=config.attention_chunk_size,
        max_num_seqs=RUNNING,
        max_num_tokens=MAX_TOKENS,
        **heads,
    )
    backend = TritonBackend(
        AttentionContext(
            requirements=requirements,
            platform=CARD,
            device="meta",
            page_size=PAGE,
            options={},
            logger=logging.getLogger(),
        ),
        attention_tiles(CARD.arch, name, config.head_dim, name),
        PROCESSORS,
        launch.Traits(converts_fp8=True, starts_early=True, interpreted=False),
    )
    runner = Runner(
        model,
        KVMemory(groups, plan, head_dim=config.head_dim, dtype=dtype, device=device, **heads),
        backend,
        SamplingPipeline({"default": DefaultSampler()}, vocab_size=config.vocab_size),
        groups=groups,
        page_size=PAGE,
        max_running=RUNNING,
        max_context=plan.max_context,
        device=device,
        native_chunk=True,
    )
    return runner, plan


def rehearse_start(context: int) -> None:
    """As engine.build does it, for the card."""
    device = torch.device("cuda")
    with WithoutMemory(device), torch.inference_mode():
        runner, _ = make_runner(context, device)
        one_layer_of_each_kind(runner.model)
        rehearse(runner, SHAPES, first_batches(MAX_TOKENS, RUNNING, runner.model.config.attention_chunk_size))


def make_engine(context: int, launches: Launches) -> Engine:
    runner, plan = make_runner(context, torch.device("meta"))
    config = runner.model.config
    limits = SchedulerLimits(
        max_running=RUNNING,
        max_tokens_per_step=MAX_TOKENS,
        chunk_size=config.attention_chunk_size,
        max_context=plan.max_context,
    )
    kv = KVManager(config.kv_groups(), PAGE, plan.num_superpages, prefix_cache=False, max_local=plan.max_local)
    runner.graphs = Replayed(runner, SHAPES, launches)  # type: ignore[assignment]
    return Engine(Scheduler(limits, kv), runner, overlap=True)


class Traffic:
    """Requests of one round; the same for the same seed."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._random, self._names = engine, random.Random(seed), iter(range(1 << 30))
        self._seed = seed

    def long_prompt(self, length: int) -> Iterator[None]:
        """31 requests decode while a long prompt comes in, by pieces of the lengths that a target for the time between tokens makes."""
        step, draw = self._engine.step, self._random
        step(Inbox(requests=[self._request(1024, 1 << 20) for _ in range(31)]))
        for _ in range(40):
            step()
        long = self._request(length, 1)
        output = step(Inbox(requests=[long]))
        while not any(update.request_id == long.request_id and update.new_token_ids for update in output.updates):
            token_ms = 0.0105 * draw.uniform(0.9, 2.0)
            costs = StepCosts(target_ms=30, base_ms=8, token_ms=token_ms, score_ms=1e-7, max_prefill_tokens=4096)
            output = step(Inbox(step_costs=costs))
            yield
        self._end()

    def chats(self, steps: int) -> Iterator[None]:
        """Requests of all lengths come and go."""
        self._engine.scheduler.costs = None
        for _ in range(steps):
            new = []
            while self._random.random() < 0.25:
                prompt, answer = (int(2 ** self._random.uniform(0, most)) for most in (13, 8))
                new.append(self._request(prompt, answer))
            self._engine.step(Inbox(requests=new))
            yield
        self._end()

    def _request(self, prompt: int, answer: int) -> Request:
        limit = self._engine.scheduler.limits.max_context
        return Request(
            request_id=f"{self._seed}-{next(self._names)}",
            prompt_token_ids=[1] * prompt,
            params=SamplingParams(temperature=1.0, seed=0, max_tokens=answer, ignore_eos=True),
            eos_token_ids=(),
            max_total_tokens=min(prompt + answer, limit),
        )

    def _end(self) -> None:
        self._engine.abort([seq.request.request_id for seq in self._engine.scheduler.sequences])
        while self._engine.has_work:
            self._engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="131072,131072", help="lengths of the long prompts, one a round")
    parser.add_argument("--steps", type=int, default=500, help="of chats in each round")
    args = parser.parse_args()
    prompts = [int(length) for length in args.prompts.split(",")]
    launches = Launches()
    JITFunction.run = lambda kernel, *a, **options: launches.note(kernel, *a, **options)
    l4core.engine.run.runner.Download = Arrived  # type: ignore[misc,assignment,attr-defined]
    l4core.ops.skinny_triton.gains = lambda device: True  # type: ignore[assignment]
    l4core.ops.overlap_triton._starts_early = lambda device: True  # type: ignore[assignment]
    context = max(prompts) + 64
    rehearse_start(context)
    _report("rehearsal", launches, 0)
    before = len(launches.seen)
    engine = make_engine(context, launches)
    _report("graphs", launches, before)
    for number, length in enumerate(prompts, 1):
        before, traffic = len(launches.seen), Traffic(engine, number)
        steps = sum(1 for work in (traffic.long_prompt(length), traffic.chats(args.steps)) for _ in work)
        _report(f"round {number}, {steps} steps", launches, before)


def _report(name: str, launches: Launches, before: int) -> None:
    new = Counter(list(launches.seen.values())[before:])
    kernels = ", ".join(f"{kernel} {count}" for kernel, count in new.most_common())
    print(f"{name}: {sum(new.values())} variants" + (f": {kernels}" if kernels else ""), flush=True)


if __name__ == "__main__":
    main()
