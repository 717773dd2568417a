"""/metrics: one table of names, each with the names that dashboards made for vLLM read. Fed by the bridge; counts nothing on its own clock
but latencies, which are measured where the server sees them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from l4core.request import DRAFT_PAUSES, FinishReason, Request, SequenceUpdate, StepOutput, StepStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2.0, 5.0)
REQUEST_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
TOKEN_COUNTS = tuple(float(4**power) for power in range(1, 13))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """name: ours, without `_total`.  aliases: the same series under other names.  sglang: its counterpart there, for docs/metrics.md; not served."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    aliases: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    sglang: str = ""


def _row(
    name: str,
    kind: Literal["gauge", "counter", "histogram"],
    help: str,
    *aliases: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = (),
    sglang: str = "",
) -> Row:
    return Row(name=name, kind=kind, help=help, aliases=aliases, labels=labels, buckets=buckets, sglang=sglang)


TABLE = (
    _row(
        "l4_requests_running",
        "gauge",
        "sequences in the running batch",
        "vllm:num_requests_running",
        sglang="sglang:num_running_reqs",
    ),
    _row(
        "l4_requests_waiting",
        "gauge",
        "sequences waiting for their first step",
        "vllm:num_requests_waiting",
        sglang="sglang:num_queue_reqs",
    ),
    _row(
        "l4_kv_usage_ratio",
        "gauge",
        "share of KV memory that requests hold, 0 to 1",
        "vllm:kv_cache_usage_perc",
        sglang="sglang:token_usage",
    ),
    _row(
        "l4_kv_pages",
        "gauge",
        "KV pages; state is used, cached (held by nobody, findable) or total (were all memory this group's)",
        labels=("group", "state"),
    ),
    _row(
        "l4_preemptions",
        "counter",
        "sequences put back for want of KV pages",
        "vllm:num_preemptions",
        sglang="sglang:num_retracted_requests_total",
    ),
    _row(
        "l4_prompt_tokens", "counter", "prompt tokens computed: cached ones are not, after a preemption they are again"
    ),
    _row(
        "l4_generation_tokens",
        "counter",
        "tokens generated",
        "vllm:generation_tokens",
        sglang="sglang:generation_tokens_total",
    ),
    _row(
        "l4_prefix_cache_queries",
        "counter",
        "prompt tokens of sequences that have begun to answer, computed or found",
        "vllm:prefix_cache_queries",
        "vllm:prompt_tokens",
        sglang="sglang:prompt_tokens_total",
    ),
    _row(
        "l4_prefix_cache_hits",
        "counter",
        "those of them found in the prefix cache",
        "vllm:prefix_cache_hits",
        sglang="sglang:cached_tokens_total",
    ),
    _row(
        "l4_prefix_cache_group_hits",
        "counter",
        "tokens whose KV was found computed, restarts after preemption among them",
        labels=("group",),
    ),
    _row(
        "l4_requests_finished",
        "counter",
        "sequences that ended by themselves",
        "vllm:request_success",
        labels=("finished_reason",),
        sglang="sglang:num_requests_total",
    ),
    _row("l4_requests_failed", "counter", "sequences ended by an error of their own", "vllm:corrupted_requests"),
    _row("l4_requests_dropped", "counter", "sequences aborted, refused by the engine or lost with it"),
    _row(
        "l4_time_to_first_token_seconds",
        "histogram",
        "from submission to the first token",
        "vllm:time_to_first_token_seconds",
        buckets=FIRST_TOKEN_SECONDS,
        sglang="sglang:time_to_first_token_seconds",
    ),
    _row(
        "l4_inter_token_latency_seconds",
        "histogram",
        "between one token and the next; tokens that a verification brings together are one",
        "vllm:inter_token_latency_seconds",
        buckets=TOKEN_SECONDS,
        sglang="sglang:inter_token_latency_seconds",
    ),
    _row(
        "l4_time_per_output_token_seconds",
        "histogram",
        "mean over a finished sequence, without its first token",
        "vllm:request_time_per_output_token_seconds",
        buckets=TOKEN_SECONDS,
    ),
    _row(
        "l4_request_latency_seconds",
        "histogram",
        "from submission to the end of a finished sequence",
        "vllm:e2e_request_latency_seconds",
        buckets=REQUEST_SECONDS,
        sglang="sglang:e2e_request_latency_seconds",
    ),
    _row(
        "l4_request_prompt_tokens",
        "histogram",
        "prompt length of finished sequences",
        "vllm:request_prompt_tokens",
        buckets=TOKEN_COUNTS,
        sglang="sglang:prompt_tokens_histogram",
    ),
    _row(
        "l4_request_generation_tokens",
        "histogram",
        "output length of finished sequences",
        "vllm:request_generation_tokens",
        buckets=TOKEN_COUNTS,
        sglang="sglang:generation_tokens_histogram",
    ),
    _row(
        "l4_spec_decode_position_drafted",
        "counter",
        "guesses judged, by their place in the draft: not those behind the end of an answer",
        labels=("position",),
    ),
    _row(
        "l4_spec_decode_position_accepted",
        "counter",
        "guesses that were right with all before them, by their place in the draft",
        labels=("position",),
    ),
    _row("l4_spec_decode_drafts", "counter", "drafts verified", "vllm:spec_decode_num_drafts"),
    _row("l4_spec_decode_draft_tokens", "counter", "all guesses verified", "vllm:spec_decode_num_draft_tokens"),
    _row(
        "l4_spec_decode_accepted_tokens",
        "counter",
        "guesses that were right",
        "vllm:spec_decode_num_accepted_tokens",
    ),
    _row(
        "l4_spec_decode_guesses",
        "gauge",
        "guesses made for a sequence in the last step with decodes, 0 in a pause (--dp: mean over all engines' sequences)",
    ),
    _row(
        "l4_spec_decode_pauses",
        "counter",
        "times that guessing paused; reason is slower (than plain steps) or no_guesses (none was made for a while)",
        labels=("reason",),
    ),
    _row("l4_engine_up", "gauge", "engines that run with a loaded model: 0 or 1, with --dp N up to N"),
    _row("l4_engine_restarts", "counter", "times the engine process was started again"),
    _row("l4_http_responses", "counter", "HTTP replies", labels=("route", "status")),
)
MAKERS: dict[str, type[MetricWrapperBase]] = {"gauge": Gauge, "counter": Counter}


@dataclass(slots=True)
class _Clock:
    """Of one sequence. first, last: when its tokens came (0.0 = not yet)."""

    submitted: float
    num_prompt: int
    num_output: int = 0
    first: float = 0.0
    last: float = 0.0


class Metrics(Collector):
    """All series of one server; every one carries model_name. An Observer of the bridge."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._made = {row.name: _make(row) for row in TABLE}
        self._clocks: dict[str, _Clock] = {}
        self._pages_total: Mapping[str, int] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        for row in TABLE:
            if not row.labels:  # a series that has not moved yet is shown as 0, not left out
                self._made[row.name].labels(**self._labels)
        for name in ("l4_spec_decode_position_drafted", "l4_spec_decode_position_accepted"):
            self._counter(name, position="1")
        for reason in DRAFT_PAUSES:
            self._counter("l4_spec_decode_pauses", reason=reason)
        self._first_token = self._histogram("l4_time_to_first_token_seconds")
        self._next_token = self._histogram("l4_inter_token_latency_seconds")
        self._generated = self._counter("l4_generation_tokens")

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for row in TABLE:
            for family in self._made[row.name].collect():
                for name in (row.name, *row.aliases):
                    yield _renamed(family, row.name, name)

    def submitted(self, requests: Sequence[Request]) -> None:
        now = time.perf_counter()
        for request in requests:
            self._clocks[request.request_id] = _Clock(now, len(request.prompt_token_ids))

    def stepped(self, output: StepOutput) -> None:
        now = time.perf_counter()
        for update in output.updates:
            clock = self._clocks.get(update.request_id)
            if clock is not None:
                self._count(update, clock, now)
        self._generated.inc(sum(len(update.new_token_ids) for update in output.updates))
        self._gauge(output.stats)

    def dropped(self, request_ids: Iterable[str]) -> None:
        known = [i for i in request_ids if self._clocks.pop(i, None) is not None]
        self._counter("l4_requests_dropped").inc(len(known))

    def stopped(self, request_id: str) -> None:
        """A stop string ended it here, before the engine ended it."""
        clock = self._clocks.pop(request_id, None)
        if clock is not None:
            self._end(FinishReason.STOP, clock, time.perf_counter())

    def lost(self) -> None:
        """The sequences and pages went with the engine process."""
        self._gauge(StepStats(pages_total=self._pages_total, num_guesses=0))

    def restarted(self) -> None:
        self._counter("l4_engine_restarts").inc()

    def engines_up(self, num_ready: int) -> None:
        self._set("l4_engine_up", num_ready)

    def replied(self, route: str, status: int) -> None:
        """One HTTP reply. route: the path as the table of routes spells it, so that the label has few values."""
        self._counter("l4_http_responses", route=route, status=str(status)).inc()

    def _count(self, update: SequenceUpdate, clock: _Clock, now: float) -> None:
        num_new = len(update.new_token_ids)
        if num_new:
            if clock.num_output == 0:
                clock.first = now
                self._first_token.observe(now - clock.submitted)
                self._counter("l4_prefix_cache_queries").inc(clock.num_prompt)
                self._counter("l4_prefix_cache_hits").inc(update.num_cached_tokens)
            else:
                self._next_token.observe(now - clock.last)
            clock.last = now
            clock.num_output += num_new
        if update.finish_reason is not None:
            del self._clocks[update.request_id]
            self._end(update.finish_reason, clock, now)

    def _end(self, reason: FinishReason, clock: _Clock, now: float) -> None:
        if reason is FinishReason.ERROR:
            self._counter("l4_requests_failed").inc()
            return
        if reason is FinishReason.ABORT:
            self._counter("l4_requests_dropped").inc()
            return
        self._counter("l4_requests_finished", finished_reason=reason.value).inc()
        self._histogram("l4_request_latency_seconds").observe(now - clock.submitted)
        self._histogram("l4_request_prompt_tokens").observe(clock.num_prompt)
        self._histogram("l4_request_generation_tokens").observe(clock.num_output)
        if clock.num_output > 1:
            per_token = (clock.last - clock.first) / (clock.num_output - 1)
            self._histogram("l4_time_per_output_token_seconds").observe(per_token)

    def _gauge(self, stats: StepStats) -> None:
        self._set("l4_requests_running", stats.num_running)
        self._set("l4_requests_waiting", stats.num_waiting)
        self._counter("l4_preemptions").inc(stats.num_preemptions)
        self._counter("l4_prompt_tokens").inc(stats.num_prefill_tokens)
        self._pages_total = stats.pages_total
        for group, total in stats.pages_total.items():
            self._set("l4_kv_pages", total, group=group, state="total")
            self._set("l4_kv_pages", stats.pages_used.get(group, 0), group=group, state="used")
            self._set("l4_kv_pages", stats.pages_cached.get(group, 0), group=group, state="cached")
        shares = [stats.pages_used.get(group, 0) / total for group, total in stats.pages_total.items() if total]
        self._set("l4_kv_usage_ratio", min(sum(shares), 1.0))
        self._count_drafts(stats)
        for group, found in stats.num_prefix_hits.items():
            self._counter("l4_prefix_cache_group_hits", group=group).inc(found)

    def _count_drafts(self, stats: StepStats) -> None:
        """Acceptance length = 1 + accepted tokens / drafts; one that an answer ends in brings one token less."""
        if stats.draft_pause:
            self._counter("l4_spec_decode_pauses", reason=stats.draft_pause).inc()
        if stats.num_guesses is not None:
            self._set("l4_spec_decode_guesses", stats.num_guesses)
        if not stats.drafted_at:
            return
        self._counter("l4_spec_decode_drafts").inc(stats.drafted_at[0])
        self._counter("l4_spec_decode_draft_tokens").inc(stats.num_drafted_tokens)
        self._counter("l4_spec_decode_accepted_tokens").inc(stats.num_accepted_tokens)
        for i, (drafted, accepted) in enumerate(zip(stats.drafted_at, stats.accepted_at, strict=True)):
            self._counter("l4_spec_decode_position_drafted", position=str(i + 1)).inc(drafted)
            self._counter("l4_spec_decode_position_accepted", position=str(i + 1)).inc(accepted)

    def _counter(self, name: str, **labels: str) -> Counter:
        made = self._made[name].labels(**self._labels, **labels)
        assert isinstance(made, Counter)
        return made

    def _histogram(self, name: str) -> Histogram:
        made = self._made[name].labels(**self._labels)
        assert isinstance(made, Histogram)
        return made

    def _set(self, name: str, value: float, **labels: str) -> None:
        made = self._made[name].labels(**self._labels, **labels)
        assert isinstance(made, Gauge)
        made.set(value)


def _make(row: Row) -> MetricWrapperBase:
    labels = ("model_name", *row.labels)
    if row.kind == "histogram":
        return Histogram(row.name, row.help, labels, registry=None, buckets=row.buckets)
    return MAKERS[row.kind](row.name, row.help, labels, registry=None)


def _renamed(family: Metric, old: str, new: str) -> Metric:
    """A copy under another name, without the `_created` series, which double the text and which nothing reads."""
    copy = Metric(new, family.documentation, family.type)
    copy.samples = [
        sample._replace(name=new + sample.name.removeprefix(old))
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return copy
