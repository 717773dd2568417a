"""Says which attention backend would run on a platform and why not each of the others: `l4 backends`, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from l4core.attention.select import Candidate, candidates, hint
from l4core.plugin_api import AttentionRequirements, Platform, Usable
from l4core.plugin_entries import PluginRow, Plugins

RELEASED_LLAMA4 = AttentionRequirements(
    num_q_heads=40,
    num_kv_heads=8,
    head_dim=128,
    q_dtype="bfloat16",
    kv_dtype="bfloat16",
    chunk_size=8192,
    max_num_seqs=256,
    max_num_tokens=8192,
)
"""What Scout and Maverick ask for on one rank; `l4 backends` explains the choice for these when no model is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All candidates for one platform, best first, the plugins that failed to load, and a hint about a missing package ("" when none)."""

    platform: Platform
    requirements: AttentionRequirements
    candidates: Sequence[Candidate]
    failures: Sequence[PluginRow]
    hint: str

    def text(self) -> str:
        """For a terminal: one line a backend, ✓ the chosen one, – usable, ✗ not usable with reason and fix."""
        req = self.requirements
        lines = [
            f"{self.platform.device_type} · {self.platform.arch}"
            + (f" · {self.platform.device_name}" if self.platform.device_name else ""),
            f"asked for: {req.num_q_heads} query heads on {req.num_kv_heads} KV heads of {req.head_dim}, queries {req.q_dtype}, KV {req.kv_dtype}, "
            f"page size {req.page_size or 'free'}, chunk {req.chunk_size or 'none'}",
        ]
        width = max((len(c.entry.name) for c in self.candidates), default=0)
        lines += [line for c in self.candidates for line in _lines(c, width)] or [
            "no plugin offers an attention backend"
        ]
        lines += [f"! plugin {row.name} {row.version} failed: {row.reason}" for row in self.failures]
        return "\n".join(lines + ([f"hint: {self.hint}"] if self.hint else []))

    def json(self) -> dict[str, Any]:
        """The same as plain data for `json.dumps`."""
        chosen = next((c.entry.name for c in self.candidates if c.chosen), None)
        platform = {
            key: getattr(self.platform, key) for key in ("device_type", "vendor", "arch", "device_name", "runtime")
        }
        return {
            "platform": platform,
            "requirements": asdict(self.requirements),
            "chosen": chosen,
            "candidates": [_json(c) for c in self.candidates],
            "failures": [asdict(row) for row in self.failures],
            "hint": self.hint,
        }


def explain(
    plugins: Plugins, platform: Platform, req: AttentionRequirements = RELEASED_LLAMA4, *, named: str | None = None
) -> Explanation:
    """Probe every backend; nothing is created and no device is touched."""
    found = candidates(plugins.attention_backends, platform, req, named=named)
    return Explanation(
        platform=platform, requirements=req, candidates=found, failures=plugins.failures, hint=hint(found, platform)
    )


def _lines(candidate: Candidate, width: int) -> list[str]:
    verdict, name = candidate.verdict, candidate.entry.name.ljust(width)
    if not isinstance(verdict, Usable):
        line = f"✗ {name}  {candidate.provided.source}: {verdict.reason}"
        return [line, f"  {' ' * width}  fix: {verdict.fix}"] if verdict.fix else [line]
    sizes = "any page size" if verdict.page_sizes is None else f"page size {', '.join(map(str, verdict.page_sizes))}"
    when = "only when named" if verdict.named_only else ""
    parts = [candidate.provided.source, verdict.provider, verdict.tier.name.lower(), when, sizes, verdict.note]
    return [f"{'✓' if candidate.chosen else '–'} {name}  {' · '.join(part for part in parts if part)}"]


def _json(candidate: Candidate) -> dict[str, Any]:
    verdict = candidate.verdict
    base = {
        "name": candidate.entry.name,
        "distribution": candidate.provided.distribution,
        "version": candidate.provided.version,
        "chosen": candidate.chosen,
        "usable": isinstance(verdict, Usable),
    }
    fields = asdict(verdict)
    return base | (fields | {"tier": verdict.tier.name} if isinstance(verdict, Usable) else fields)
