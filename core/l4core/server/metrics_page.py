"""docs/metrics.md, generated: `python -m l4core.server.metrics_page > docs/metrics.md`. A test compares the two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from l4core.request import DRAFT_PAUSES, FinishReason
from l4core.server.app import UNMATCHED
from l4core.server.metrics import TABLE, Row

HEAD = """# Metrics

Generated from the table in `core/l4core/server/metrics.py` by `python -m l4core.server.metrics_page`; do not edit.

`l4 serve` always has `/metrics`, in the text format that Prometheus scrapes (SGLang's `--enable-metrics` has no counterpart). With `--api-key`
the scraper needs the key, as `Authorization: Bearer KEY`:

```yaml
scrape_configs:
  - job_name: l4
    static_configs: [{targets: ["127.0.0.1:30000"]}]
    authorization: {credentials: KEY}
```

Every series is counted from the start of the server and lives through a restart of its engine; what a dead engine held leaves the gauges at
once. With `--dp N` all figures are of all N engines together; behind Ray Serve they are of the replica that answers. A series that has not
moved yet is shown as 0, unless its labels are not known before.

A histogram NAME is three series, `NAME_bucket{le="…"}`, `NAME_sum` and `NAME_count`; the table gives its smallest and largest limit. A row is
also served under the names in the column "as vLLM's", so that dashboards and autoscalers made for vLLM find them. "SGLang's nearest" is for
whoever moves a dashboard from there: those names are not served, and the figures are near, not always equal.
"""

FIGURES = {
    "tokens a second": "rate(l4_generation_tokens_total[1m])",
    "99th percentile of the time to the first token": (
        "histogram_quantile(0.99, sum by (le) (rate(l4_time_to_first_token_seconds_bucket[5m])))"
    ),
    "share of prompt tokens found in the prefix cache": (
        "rate(l4_prefix_cache_hits_total[5m]) / rate(l4_prefix_cache_queries_total[5m])"
    ),
    "tokens that a verification brings where no answer ends (SGLang's `sglang:spec_accept_length`)": (
        "1 + rate(l4_spec_decode_accepted_tokens_total[5m]) / rate(l4_spec_decode_drafts_total[5m])"
    ),
    "share of drafts whose first guess is right": (
        'rate(l4_spec_decode_position_accepted_total{position="1"}[5m])'
        ' / rate(l4_spec_decode_position_drafted_total{position="1"}[5m])'
    ),
}
"""What is made of the series → PromQL."""


def _words(values: tuple[str, ...]) -> str:
    return " or ".join(f"`{value}`" for value in values)


LABELS = {
    "model_name": "on every series: the name clients use (`--served-model-name`)",
    "group": "`global`: KV of the layers that see every token; `local`: of those that see their chunk",
    "state": "`used`: by requests; `cached`: held by nobody, findable; `total`: were all memory this group's",
    "finished_reason": _words((FinishReason.STOP, FinishReason.LENGTH)),
    "position": "place in the draft, from `1`; vLLM's `vllm:spec_decode_num_accepted_tokens_per_pos` counts from 0",
    "reason": f"{_words(DRAFT_PAUSES)}: plain steps are faster, or none was made for a while",
    "route": f"the path as the server's table of routes spells it, such as `/v1/chat/completions`, or `{UNMATCHED}`",
    "status": "of the HTTP reply",
}
"""Label → what it says."""


def render() -> str:
    """The whole page."""
    heads = ("series", "kind", "labels", "what it says", "as vLLM's", "SGLang's nearest")
    parts = {
        "Series": table(heads, [table_row(row) for row in TABLE]),
        "Labels": table(("label", "what it says"), [(f"`{name}`", text) for name, text in LABELS.items()]),
        "Figures made of them": table(("figure", "PromQL"), [(name, f"`{query}`") for name, query in FIGURES.items()]),
    }
    return "\n\n".join([HEAD.strip(), *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def table_row(row: Row) -> tuple[str, ...]:
    """One series under the names that a scrape shows."""
    suffix = "_total" if row.kind == "counter" else ""
    limits = f", {row.buckets[0]:g} to {row.buckets[-1]:,.12g}" if row.buckets else ""
    return (
        f"`{row.name}{suffix}`",
        row.kind + limits,
        ", ".join(f"`{label}`" for label in row.labels),
        row.help,
        ", ".join(f"`{alias}{suffix}`" for alias in row.aliases),
        f"`{row.sglang}`" if row.sglang else "",
    )


if __name__ == "__main__":
    print(render(), end="")
