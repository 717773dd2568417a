"""Chooses the expert kernel of a model, as attention.select chooses the backend: probe all, rank, create the best. Has no list of kernels."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from l4core import plugin_compat
from l4core.errors import BackendUnavailable, L4Error
from l4core.plugin_api import (
    ExpertContext,
    ExpertKernel,
    ExpertKernelEntry,
    ExpertRequirements,
    ExpertsUsable,
    Platform,
    Tier,
    Unusable,
)
from l4core.plugin_entries import Plugins, Provided, import_object, quote_failures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCandidate:
    """One kernel and its verdict."""

    provided: Provided[ExpertKernelEntry]
    verdict: ExpertsUsable | Unusable

    @property
    def name(self) -> str:
        return self.provided.entry.name


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedExperts:
    """The kernel of this engine, created. source: distribution and version."""

    kernel: ExpertKernel
    name: str
    source: str
    verdict: ExpertsUsable

    def describe(self) -> str:
        """One line for the start-up block: name, distribution and version, provider, tier."""
        parts = (f"{self.name} ({self.source})", self.verdict.provider, self.verdict.tier.name.lower())
        return " · ".join(part for part in parts if part)


def expert_candidates(plugins: Plugins, platform: Platform, req: ExpertRequirements) -> list[ExpertCandidate]:
    """Every kernel with its verdict, best first, the unusable ones last. Never raises, whatever a probe does."""
    found = [ExpertCandidate(provided=p, verdict=_probe(p, platform, req)) for p in plugins.expert_kernels]
    return sorted(found, key=lambda c: (-c.verdict.tier if isinstance(c.verdict, ExpertsUsable) else 1, c.name))


def select_experts(
    plugins: Plugins, platform: Platform, req: ExpertRequirements, *, device: str, named: str | None = None
) -> SelectedExperts:
    """Choose and create a kernel for `req` on `device`. named: the user's choice, None = automatic.

    Raises BackendUnavailable when nothing is usable or the named one refuses; under automatic choice a kernel that fails to start gives way to
    the next with a warning that names both.
    """
    found = expert_candidates(plugins, platform, req)
    queue = [_named(found, named, plugins)] if named is not None else [c for c in found if eligible(c)]
    refusals: list[BackendUnavailable] = []
    for candidate in queue:
        try:
            selected = _create(candidate, platform, req, device)
        except BackendUnavailable as error:
            if named is not None:
                raise
            refusals.append(error)
            continue
        for refusal in refusals:
            logger.warning("%s; using %s", refusal, selected.name)
        return selected
    raise BackendUnavailable(
        f"no expert kernel is usable on {platform.device_type} ({platform.arch}):"
        + ("".join(f"\n  {error.message}" for error in refusals) + "".join(_line(c) for c in found) or " there is none")
        + quote_failures(plugins.failures),
        fix="l4 plugins",
    )


def eligible(candidate: ExpertCandidate) -> bool:
    """Whether it may be taken without being named."""
    return isinstance(candidate.verdict, ExpertsUsable) and not candidate.verdict.named_only


def _line(candidate: ExpertCandidate) -> str:
    if isinstance(candidate.verdict, ExpertsUsable):
        return f"\n  {candidate.name}: used only when named" if candidate.verdict.named_only else ""
    fix = f" [{candidate.verdict.fix}]" if candidate.verdict.fix else ""
    return f"\n  {candidate.name} ({candidate.provided.source}): {candidate.verdict.reason}{fix}"


def _probe(
    provided: Provided[ExpertKernelEntry], platform: Platform, req: ExpertRequirements
) -> ExpertsUsable | Unusable:
    refused = plugin_compat.refusal(provided.entry.api, provided.distribution, provided.version)
    if refused is not None:
        return refused
    try:
        verdict: object = provided.entry.probe(platform, req)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a plugin's bug must not stop the others; its text is kept)
        return Unusable(reason=f"its probe raised {type(error).__name__}: {error}")
    if isinstance(verdict, Unusable):
        return verdict if verdict.reason else Unusable(reason="its probe refused without a reason", fix=verdict.fix)
    if not isinstance(verdict, ExpertsUsable):
        return Unusable(reason=f"its probe returned {type(verdict).__name__}; wanted ExpertsUsable or Unusable")
    tier: object = verdict.tier
    if not isinstance(tier, Tier):
        return Unusable(reason=f"its probe returned tier {tier!r}; wanted a Tier")
    if req.needs_graph and not verdict.graph:
        return Unusable(
            reason="graph capture is asked for; this kernel does not declare it", fix="--disable-cuda-graph"
        )
    return verdict


def _named(found: Sequence[ExpertCandidate], name: str, plugins: Plugins) -> ExpertCandidate:
    """The named candidate. BackendUnavailable when there is none of that name or its verdict is Unusable."""
    candidate = next((c for c in found if c.name == name), None)
    if candidate is None:
        known = sorted(c.name for c in found)
        near = difflib.get_close_matches(name, known, n=1)
        raise BackendUnavailable(
            f"no installed plugin offers the expert kernel {name!r}; there are {', '.join(known) or 'none'}"
            + quote_failures(plugins.failures),
            fix=f"--expert-kernel {near[0]}" if near else "l4 plugins",
        )
    if isinstance(candidate.verdict, Unusable):
        raise BackendUnavailable(
            f"expert kernel {name!r} ({candidate.provided.source}) is not usable here: {candidate.verdict.reason}",
            fix=candidate.verdict.fix or "leave --expert-kernel out; `l4 backends --experts` lists what is usable",
        )
    return candidate


def _create(candidate: ExpertCandidate, platform: Platform, req: ExpertRequirements, device: str) -> SelectedExperts:
    """BackendUnavailable, with the kernel's name and version, for whatever goes wrong."""
    entry, source, verdict = candidate.provided.entry, candidate.provided.source, candidate.verdict
    assert isinstance(verdict, ExpertsUsable)
    who = f"expert kernel {entry.name!r} ({source})"
    context = ExpertContext(
        requirements=req, platform=platform, device=device, logger=logging.getLogger(f"l4core.experts.{entry.name}")
    )
    try:
        kernel = import_object(entry.create)(context)
    except L4Error as error:
        raise BackendUnavailable(f"{who}: {error.message}", fix=error.fix) from error
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(f"{who} failed at start: {type(error).__name__}: {error}") from error
    if not isinstance(kernel, ExpertKernel):
        raise BackendUnavailable(f"{who}: {entry.create} returned {type(kernel).__name__}; wanted an ExpertKernel")
    return SelectedExperts(kernel=kernel, name=entry.name, source=source, verdict=verdict)
