"""Says which expert kernel would run on a platform and why not each of the others: `l4 backends --experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from l4core.experts.select import ExpertCandidate, eligible, expert_candidates
from l4core.plugin_api import ExpertRequirements, ExpertsUsable, Platform
from l4core.plugin_entries import PluginRow, Plugins

RELEASED_SCOUT = ExpertRequirements(
    num_experts=16, hidden_size=5120, intermediate_size=8192, dtype="bfloat16", max_num_tokens=8192
)
"""What Scout asks for on one rank; the choice is explained for this when no model is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertExplanation:
    """All candidates for one platform, best first, and the plugins that failed to load."""

    platform: Platform
    requirements: ExpertRequirements
    candidates: Sequence[ExpertCandidate]
    failures: Sequence[PluginRow]

    @property
    def chosen(self) -> str | None:
        """The name of the one that would be taken, before its `create` has its say."""
        return next((c.name for c in self.candidates if eligible(c)), None)

    def text(self) -> str:
        """For a terminal: one line a kernel, ✓ the chosen one, – usable, ✗ not usable with reason and fix."""
        req = self.requirements
        lines = [
            f"{self.platform.device_type} · {self.platform.arch}",
            f"asked for: {req.num_experts} experts of {req.hidden_size} by {req.intermediate_size}, {req.dtype}, weights {req.weight_format}, "
            f"shared expert {req.shared_format or 'by itself'}",
        ]
        width = max((len(c.name) for c in self.candidates), default=0)
        lines += [line for c in self.candidates for line in self._lines(c, width)]
        return "\n".join(
            [*lines, *(f"! plugin {row.name} {row.version} failed: {row.reason}" for row in self.failures)]
        )

    def _lines(self, candidate: ExpertCandidate, width: int) -> list[str]:
        verdict, name, source = candidate.verdict, candidate.name.ljust(width), candidate.provided.source
        if not isinstance(verdict, ExpertsUsable):
            fix = [f"  {' ' * width}  fix: {verdict.fix}"] if verdict.fix else []
            return [f"✗ {name}  {source}: {verdict.reason}", *fix]
        when = "only when named" if verdict.named_only else ""
        parts = (source, verdict.provider, verdict.tier.name.lower(), when, verdict.note)
        return [f"{'✓' if candidate.name == self.chosen else '–'} {name}  {' · '.join(part for part in parts if part)}"]

    def json(self) -> dict[str, Any]:
        """The same as plain data for `json.dumps`."""
        return {
            "arch": self.platform.arch,
            "requirements": asdict(self.requirements),
            "chosen": self.chosen,
            "candidates": [
                {"name": c.name, "source": c.provided.source, "usable": isinstance(c.verdict, ExpertsUsable)}
                | asdict(c.verdict)
                for c in self.candidates
            ],
            "failures": [asdict(row) for row in self.failures],
        }


def explain_experts(
    plugins: Plugins, platform: Platform, req: ExpertRequirements = RELEASED_SCOUT
) -> ExpertExplanation:
    """Probe every kernel; nothing is created and no device is touched."""
    return ExpertExplanation(
        platform=platform,
        requirements=req,
        candidates=expert_candidates(plugins, platform, req),
        failures=plugins.failures,
    )
