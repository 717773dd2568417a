"""Results as rows of a table and as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l4core.bench.svg import Axis, Series, line_chart

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def serve_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """One row a load: latencies in ms as p50 / p99."""
    head = ["load", "ok", "failed", "req/s", "out tok/s", "in flight", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms"]
    extra = [
        ("goodput/s", "goodput_per_s", "{:.2f}"),
        ("floor ms", "floor_ms", "{:.2f}"),
    ]
    shown = [(name, key, form) for name, key, form in extra if points and key in points[0]]
    rows = [
        [
            p["load"],
            str(p["ok"]),
            str(p["requests"] - p["ok"]),
            f"{p['requests_per_s']:.2f}",
            f"{p['output_tokens_per_s']:.1f}",
            f"{p['mean_in_flight']:.1f}",
            *(middle_and_tail(p[key]) for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")),
            *(form.format(p[key]) for _, key, form in shown),
        ]
        for p in points
    ]
    return [*head, *(name for name, _, _ in shown)], rows


def notes(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong, and what the table cannot say."""
    lines = []
    for p in points:
        if p["errors"]:
            counted = ", ".join(f"{count} × {kind}" for kind, count in sorted(p["errors"].items()))
            lines.append(f"{p['load']}: {counted}; the first: {p['first_error']}")
        late = p["send_lag_ms"].get("p99", 0.0)
        if late > 20:
            lines.append(f"{p['load']}: this client sent late, p99 {late:.0f} ms; its latencies include that")
        intruder = p.get("intruder")
        if intruder:
            lines.append(f"{p['load']}: {_intruded(intruder)}")
    return lines


def _intruded(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"the long prompt failed: {found['error']}"
    itl = middle_and_tail(found["itl_ms"])
    return f"while {found['input_tokens']:,} tokens were prefilled in {found['ttft_ms'] / 1e3:.2f} s, ITL ms was {itl} for the others"


def middle_and_tail(found: Mapping[str, float]) -> str:
    return f"{found['p50']:.1f} / {found['p99']:.1f}" if found else "–"


def serve_charts(points: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """File name → SVG: latencies over throughput, for the loads that had an answer."""
    good = sorted((p for p in points if p["ok"]), key=lambda p: p["output_tokens_per_s"])
    charts = {}
    for key, name in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2e_ms", "E2E")):
        lines = [
            Series(name=f"{name} {rank}", points=[(p["output_tokens_per_s"], p[key][rank]) for p in good if p[key]])
            for rank in ("p50", "p99")
        ]
        if key == "tpot_ms" and all("floor_ms" in p for p in good):
            floor = [(p["output_tokens_per_s"], p["floor_ms"]) for p in good]
            lines.append(Series(name="floor", points=floor, dashed=True))
        if any(line.points for line in lines):
            charts[f"{name.lower()}.svg"] = line_chart(
                f"{name} over throughput", Axis(label="output tokens/s"), Axis(label="ms"), lines
            )
    return charts


def steps_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `latency`: what one step or prefill took, beside its floor."""
    head = ["", "ms", "floor ms", "ratio", "tok/s", "experts", "p99 ms"]
    return head, [
        [
            row["name"],
            f"{row['ms']:.3f}",
            f"{row['floor_ms']:.3f}",
            f"{row['ms'] / row['floor_ms']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['experts']:.2f}",
            f"{row['p99_ms']:.3f}",
        ]
        for row in rows
    ]


def kernels_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `kernels`."""
    head = ["part", "tokens", "µs", "floor µs", "ratio", "GB/s", "TFLOP/s"]
    return head, [
        [
            row["name"],
            str(row["tokens"]),
            f"{row['us']:.1f}",
            f"{row['floor_us']:.1f}",
            f"{row['us'] / row['floor_us']:.2f}",
            f"{row['gb_per_s']:,.1f}",
            f"{row['tflop_per_s']:.3g}",
        ]
        for row in rows
    ]


def steps_charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Decode step time over batch, beside the floor."""
    decodes = [row for row in rows if row["kind"] == "decode"]
    if not decodes:
        return {}
    lines = [
        Series(name="measured", points=[(row["batch"], row["ms"]) for row in decodes]),
        Series(name="floor", points=[(row["batch"], row["floor_ms"]) for row in decodes], dashed=True),
    ]
    chart = line_chart("A decode step", Axis(label="requests at once", log=True), Axis(label="ms"), lines)
    return {"decode.svg": chart}
