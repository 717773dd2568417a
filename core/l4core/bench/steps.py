"""Times of the engine in this process, without text, HTTP or other requests: decode steps, prefills, and throughput of many requests."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from l4core.bench.datasets import Sample
from l4core.bench.device import Rates, measure_rates
from l4core.bench.floor import Weights, decode_bytes, prefill_floor_ms, weights_of
from l4core.bench.kernels import measure
from l4core.bench.stats import percentile, summary
from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.pace import paced
from l4core.engine.start.build import build_engine
from l4core.errors import ConfigError, L4Error
from l4core.model.config import ModelConfig
from l4core.model.moe import MoE
from l4core.request import Request, SamplingParams

WARMUP = 4
"""Decode steps that are not counted."""


class Bench:
    """One engine. report: its start-up block.  ready_s: seconds until it could take requests.  rates: of the device, beside the loaded model.
    kv_bytes: of a stored key or value element."""

    def __init__(self, config: EngineConfig, *, progress: bool = True, model_config: ModelConfig | None = None) -> None:
        """model_config: shapes that no folder holds, with dummy weights. ConfigError for more than one rank: this process is one."""
        if config.tp > 1:
            raise ConfigError(
                f"--tp is {config.tp}, and one device is measured in this process",
                fix=f"l4 serve --tp {config.tp} and l4 bench serve, or l4 bench predict --ranks {config.tp}",
            )
        began = time.perf_counter()
        built = build_engine(config, progress=progress, model_config=model_config)
        self.ready_s = time.perf_counter() - began
        self.report, self.config, self.context_length = built.report, built.model_config, built.context_length
        self.max_running = config.max_running_requests
        self._engine, self._step = built.engine, paced(built.engine, config.itl_target_ms, built.drafts)
        self._names = itertools.count()
        self.seed = config.random_seed
        self._random = random.Random(self.seed)
        model = built.engine.runner.model
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.device, self.dtype = tensors[0][1].device, tensors[0][1].dtype
        self._weights = weights_of(
            ((name, t.numel() * t.itemsize) for name, t in tensors), tied=self.config.tie_word_embeddings
        )
        self.kv_bytes = built.engine.runner.memory.view(0).k.itemsize
        self.rates: Rates = measure_rates(self.device, self.dtype)

    @property
    def weights(self) -> Weights:
        """As they are stored on the device, quantised or not."""
        return self._weights

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """A step with `batch` requests of `context` tokens and growing: the mean of `steps`, and its floor, for which the distinct experts of one
        more step are counted. With speculation a step may bring a request several tokens; all count, and the floor is that of a plain step."""
        speculation = self._engine.speculation
        most = 1 if speculation is None else 1 + speculation.max_drafts
        self._fits(batch, context + (WARMUP + steps + 8) * most)
        # As long as may be: the first decode while the last still wait for their prompts, and none may end.
        self._prefill(self._requests(batch, context, self.context_length - context))
        for _ in range(WARMUP):
            self._step(Inbox())
        times, num_tokens = [time.perf_counter()], 0
        for _ in range(steps):
            output = self._step(Inbox())
            times.append(time.perf_counter())
            num_tokens += sum(len(update.new_token_ids) for update in output.updates)
            if output.stats.num_decode_tokens < batch:
                raise L4Error(
                    f"only {output.stats.num_decode_tokens} of {batch} requests decoded in a step: KV memory is short",
                    fix="a smaller --batch or --input-len",
                )
        ms = (times[-1] - times[0]) / steps * 1e3
        experts = self._experts_hit()
        self._clear()
        read = decode_bytes(
            self.config,
            self._weights,
            batch=batch,
            context=context + WARMUP + steps // 2,
            kv_bytes=self.kv_bytes,
            experts=experts,
        )
        gaps = sorted((b - a) * 1e3 for a, b in itertools.pairwise(times))
        return {
            "kind": "decode",
            "name": f"decode bs {batch} at {context}",
            "batch": batch,
            "context": context,
            "ms": ms,
            "p99_ms": percentile(gaps, 99),
            "floor_ms": read / self.rates.copy * 1e3,
            "bytes": read,
            "tokens_per_s": num_tokens / (times[-1] - times[0]),
            "experts": experts,
        }

    def prefill(self, batch: int, length: int, repeats: int) -> dict[str, Any]:
        """From nothing until each of `batch` prompts has its first token: the best of `repeats`."""
        self._fits(batch, length + 1)
        self._prefill(self._requests(batch, length, 1))
        times = []
        for _ in range(repeats):
            requests = self._requests(batch, length, 1)
            began = time.perf_counter()
            self._prefill(requests)
            times.append((time.perf_counter() - began) * 1e3)
        self._clear()
        return {
            "kind": "prefill",
            "name": f"prefill {batch}x{length}",
            "batch": batch,
            "context": length,
            "ms": min(times),
            "p99_ms": percentile(sorted(times), 99),
            "floor_ms": prefill_floor_ms(
                self.config,
                self._weights,
                batch=batch,
                length=length,
                copy=self.rates.copy,
                matmul=self.rates.matmul,
            ),
            "tokens_per_s": batch * length / min(times) * 1e3,
            "experts": float(self.config.num_experts),
        }

    def kernels(self, tokens: Sequence[int], context: int) -> list[dict[str, Any]]:
        """Parts of a layer by themselves (bench.kernels)."""
        self._fits(1, context)
        return list(measure(self._engine.runner, self.config, self.rates, tokens=tokens, context=context))

    def throughput(self, samples: Sequence[Sample], told: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """All samples at once, as fast as the engine takes them. told: is given the number of answers that ended, whenever it changes."""
        requests = [self._request(s.prompt, s.max_tokens) for s in samples if not isinstance(s.prompt, str)]
        if len(requests) < len(samples):
            raise ConfigError("prompts of text need a tokenizer", fix="l4 bench serve takes them, against a server")
        left = {r.request_id: len(r.prompt_token_ids) for r in requests}
        inbox, errors, num_answered = Inbox(requests=requests), list[str](), 0
        began, num_output, prefill_tokens = time.perf_counter(), 0, 0
        step_times = []
        while left:
            before = time.perf_counter()
            output = self._step(inbox)
            step_times.append((time.perf_counter() - before) * 1e3)
            inbox = Inbox()
            prefill_tokens += output.stats.num_prefill_tokens
            for update in output.updates:
                num_output += len(update.new_token_ids)
                if update.finish_reason is not None:
                    num_prompt = left.pop(update.request_id)
                    num_answered += 0 if update.error else num_prompt
                    errors += [update.error] if update.error else []
                    told(len(requests) - len(left))
        seconds = time.perf_counter() - began
        num_input = sum(len(r.prompt_token_ids) for r in requests)
        return {
            "requests": len(requests),
            "failed": len(errors),
            "first_error": errors[0] if errors else "",
            "seconds": seconds,
            "requests_per_s": (len(requests) - len(errors)) / seconds,
            "input_tokens": num_input,
            "prefilled_tokens": prefill_tokens,
            "output_tokens": num_output,
            "output_tokens_per_s": num_output / seconds,
            "total_tokens_per_s": (num_answered + num_output) / seconds,
            "step_ms": summary(step_times),
        }

    def _experts_hit(self) -> float:
        """Distinct experts a layer that one more step hits, the mean of the layers that have any. That step is made without graphs: a replay calls
        no hook."""
        found: list[int] = []

        def note(moe: Any, given: tuple[Any, ...]) -> None:
            found.append(moe.router(given[0]).argmax(-1).unique().numel())

        runner: Any = self._engine.runner
        hooks = [m.register_forward_pre_hook(note) for m in runner.model.modules() if isinstance(m, MoE)]
        graphs, runner.graphs = getattr(runner, "graphs", None), None
        try:
            self._step(Inbox())
        finally:
            runner.graphs = graphs
            for hook in hooks:
                hook.remove()
        return sum(found) / len(found) if found else 0.0

    # --- requests ----------------------------------------------------------------------------------------------------------------------

    def _fits(self, batch: int, length: int) -> None:
        if batch > self.max_running:
            raise ConfigError(
                f"a batch of {batch} is more than {self.max_running} requests at once",
                fix=f"--max-running-requests {batch}",
            )
        if length > self.context_length:
            raise ConfigError(
                f"{length} tokens a request; the context holds {self.context_length}", fix="a smaller --input-len"
            )

    def _requests(self, batch: int, length: int, new: int) -> list[Request]:
        ids = range(self.config.vocab_size)
        return [self._request(self._random.choices(ids, k=length), new) for _ in range(batch)]

    def _request(self, prompt: Sequence[int], new: int) -> Request:
        number = next(self._names)
        return Request(
            request_id=f"bench-{number}",
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=1.0, seed=number, max_tokens=new, ignore_eos=True),
            eos_token_ids=(),
            max_total_tokens=len(prompt) + new,
        )

    def _prefill(self, requests: Sequence[Request]) -> None:
        """Step until each of the requests has a token."""
        waiting, inbox = {r.request_id for r in requests}, Inbox(requests=requests)
        while waiting:
            for update in self._step(inbox).updates:
                if update.error:
                    raise L4Error(f"a request failed: {update.error}")
                if update.new_token_ids:
                    waiting.discard(update.request_id)
            inbox = Inbox()

    def _clear(self) -> None:
        self._engine.abort([seq.request.request_id for seq in self._engine.scheduler.sequences])
        while self._engine.has_work:
            self._step(Inbox())
        self._step(Inbox(flush_cache=True))
