"""Chooses the attention backend: probe all, rank, create the best, check it on the device. Has no list of backends of its own.

Two stages. Probes are pure and cheap, so every candidate gets a verdict. `create` and the smoke check run for the chosen one only; where the
user named it a failure ends the start, otherwise the next candidate is taken with one warning that names both.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from l4core import plugin_compat
from l4core.attention.hints import best_missing, package_of
from l4core.attention.smoke import smoke_check
from l4core.attention.verdicts import choose_page_size, hold_to
from l4core.errors import BackendUnavailable, ConfigError, L4Error
from l4core.plugin_api import (
    AttentionBackend,
    AttentionBackendEntry,
    AttentionContext,
    AttentionRequirements,
    Platform,
    Tier,
    Unusable,
    Usable,
)
from l4core.plugin_entries import Plugins, Provided, import_object, quote_failures

logger = logging.getLogger(__name__)

Offered = Provided[AttentionBackendEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One backend and its verdict. chosen: it would be taken, before `create` has its say."""

    provided: Offered
    verdict: Usable | Unusable
    chosen: bool = False

    @property
    def entry(self) -> AttentionBackendEntry:
        return self.provided.entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The backend of this engine, created and checked. version, distribution: of its package.  page_size: tokens.  hint: a line about a package
    that would serve this device better, or ""."""

    backend: AttentionBackend
    entry: AttentionBackendEntry
    verdict: Usable
    page_size: int
    distribution: str
    version: str
    hint: str = ""

    @property
    def provider(self) -> str:
        return self.verdict.provider

    def describe(self) -> str:
        """One line for the start-up block: name, distribution and version, provider, tier, hint."""
        parts = [
            f"{self.entry.name} ({self.distribution} {self.version})",
            self.provider,
            self.verdict.tier.name.lower(),
        ]
        return " · ".join(part for part in (*parts, self.hint) if part)


def candidates(
    entries: Sequence[Offered], platform: Platform, req: AttentionRequirements, *, named: str | None = None
) -> list[Candidate]:
    """Every backend with its verdict, best first, the unusable ones last. Never raises, whatever a probe does."""
    found = [Candidate(provided=offered, verdict=_probe(offered, platform, req)) for offered in entries]
    found.sort(key=_rank)
    for i, candidate in enumerate(found):
        if _eligible(candidate, named):
            found[i] = replace(candidate, chosen=True)
            break
    return found


def _rank(candidate: Candidate) -> tuple[int, str]:
    verdict = candidate.verdict
    return (-verdict.tier if isinstance(verdict, Usable) else 1, candidate.entry.name)


def _probe(offered: Offered, platform: Platform, req: AttentionRequirements) -> Usable | Unusable:
    refused = plugin_compat.refusal(offered.entry.api, offered.distribution, offered.version)
    if refused is not None:
        return refused
    try:
        verdict: object = offered.entry.probe(platform, req)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a plugin's bug must not stop the others; its text is kept)
        return Unusable(
            reason=f"its probe raised {type(error).__name__}: {error}", fix=f"tell the authors of {offered.source}"
        )
    return hold_to(verdict, req)


def select_backend(
    plugins: Plugins,
    platform: Platform,
    req: AttentionRequirements,
    *,
    device: str,
    named: str | None = None,
    options: Mapping[str, str] | None = None,
) -> Selected:
    """Choose, create and check a backend for `req` on `device` (a torch device string of `platform`).

    named: the user's choice, None = automatic.  options: `--attention-option` pairs for the chosen backend.
    Raises BackendUnavailable (nothing usable, or the named one refuses) and ConfigError (an unknown option, a page size that does not fit).
    """
    options = options or {}
    if req.page_size is not None and req.chunk_size is not None and req.chunk_size % req.page_size:
        raise ConfigError(
            f"page size {req.page_size} does not divide the attention chunk of {req.chunk_size}",
            fix=f"--page-size {math.gcd(req.chunk_size, 64)}",
        )
    found = candidates(plugins.attention_backends, platform, req, named=named)
    queue = [_named(found, named, plugins)] if named is not None else [c for c in found if _eligible(c, None)]
    refusals: list[tuple[Candidate, BackendUnavailable]] = []
    for candidate in queue:
        _check_options(candidate.entry, options)
        try:
            selected = _create(candidate, platform, req, device, options)
        except BackendUnavailable as error:
            if named is not None:
                raise
            refusals.append((candidate, error))
            continue
        _tell(selected, found, refusals, automatic=named is None)
        return replace(selected, hint=hint(found, platform) if named is None else "")
    raise _nothing_left(found, refusals, platform, plugins)


def _eligible(candidate: Candidate, named: str | None) -> bool:
    """Whether it may be taken: the named one, or without a name any that does not ask to be named."""
    if not isinstance(candidate.verdict, Usable):
        return False
    return not candidate.verdict.named_only if named is None else candidate.entry.name == named


def _named(found: Sequence[Candidate], name: str, plugins: Plugins) -> Candidate:
    """The named candidate. BackendUnavailable when there is none of that name or its verdict is Unusable."""
    for candidate in found:
        if candidate.entry.name != name:
            continue
        if isinstance(candidate.verdict, Unusable):
            raise BackendUnavailable(
                f"attention backend {name!r} ({candidate.provided.source}) is not usable here: {candidate.verdict.reason}",
                fix=candidate.verdict.fix or "leave --attention-backend out; `l4 backends` lists what is usable",
            )
        return candidate
    known = sorted(candidate.entry.name for candidate in found)
    near = difflib.get_close_matches(name, known, n=1)
    package = package_of(name)
    fix = f"pip install {package}" if package else f"--attention-backend {near[0]}" if near else "l4 backends"
    raise BackendUnavailable(
        f"no installed plugin offers the attention backend {name!r}; there are {', '.join(known) or 'none'}"
        + quote_failures(plugins.failures),
        fix=fix,
    )


def _check_options(entry: AttentionBackendEntry, options: Mapping[str, str]) -> None:
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        known = "; ".join(f"{key}: {text}" for key, text in sorted(entry.options.items())) or "it has none"
        raise ConfigError(
            f"--attention-option {unknown[0]!r} is not an option of the attention backend {entry.name!r} ({known})",
            fix="name the backend that has it with --attention-backend, or leave the option out",
        )


def _create(
    candidate: Candidate, platform: Platform, req: AttentionRequirements, device: str, options: Mapping[str, str]
) -> Selected:
    """Create one candidate and smoke-check it. BackendUnavailable, with its name and version, for whatever goes wrong."""
    entry, offered, verdict = candidate.entry, candidate.provided, candidate.verdict
    assert isinstance(verdict, Usable)
    page_size = choose_page_size(verdict, req)
    context = AttentionContext(
        requirements=req,
        platform=platform,
        device=device,
        page_size=page_size,
        options=options,
        logger=logging.getLogger(f"l4core.attention.{entry.name}"),
    )
    who = f"attention backend {entry.name!r} ({offered.source})"
    try:
        backend = import_object(entry.create)(context)
        if not isinstance(backend, AttentionBackend):
            raise BackendUnavailable(
                f"{entry.create} returned {type(backend).__name__}; wanted an AttentionBackend",
                fix=f"tell the authors of {offered.source}",
            )
        smoke_check(backend, verdict, context)
    except L4Error as error:
        raise BackendUnavailable(f"{who}: {error.message}", fix=error.fix) from error
    except (Exception, SystemExit) as error:
        raise BackendUnavailable(f"{who} failed at start: {type(error).__name__}: {error}") from error
    return Selected(
        backend=backend,
        entry=entry,
        verdict=verdict,
        page_size=page_size,
        distribution=offered.distribution,
        version=offered.version,
    )


def _tell(
    selected: Selected,
    found: Sequence[Candidate],
    refusals: Sequence[tuple[Candidate, BackendUnavailable]],
    *,
    automatic: bool,
) -> None:
    """Say what a user should know of this choice: who was passed over, who tied, and that the slow one runs."""
    for candidate, error in refusals:
        logger.warning("%s; using %s instead of %s", error, selected.entry.name, candidate.entry.name)
    if not automatic:
        return
    refused = {candidate.entry.name for candidate, _ in refusals}
    tied = [
        c.entry.name
        for c in found
        if _eligible(c, None) and c.verdict.tier == selected.verdict.tier and c.entry.name not in refused  # type: ignore[union-attr]
    ]
    if len(tied) > 1:
        logger.info(
            "attention backends %s tie at tier %s; the name decides", ", ".join(tied), selected.verdict.tier.name
        )
    if selected.verdict.tier == Tier.REFERENCE:
        why = "".join(
            _reasons(found)
        )  # `l4 backends` knows this machine, but not that a tree or a page size was asked for
        logger.warning(
            "attention runs on %s: right, but slow%s", selected.entry.name, f". Not usable:{why}" if why else ""
        )


def hint(found: Sequence[Candidate], platform: Platform) -> str:
    """A line naming the package that would serve this platform best, "" when nothing better is known."""
    missing = best_missing(
        platform, {c.entry.name for c in found}, {c.entry.name for c in found if isinstance(c.verdict, Usable)}
    )
    return f"{missing.package} is made for {platform.arch}: pip install {missing.package}" if missing else ""


def _reasons(found: Sequence[Candidate]) -> list[str]:
    """A line for each backend that is not usable."""
    return [
        f"\n  {c.entry.name} ({c.provided.source}): {c.verdict.reason}"
        + (f" [{c.verdict.fix}]" if c.verdict.fix else "")
        for c in found
        if isinstance(c.verdict, Unusable)
    ]


def _nothing_left(
    found: Sequence[Candidate],
    refusals: Sequence[tuple[Candidate, BackendUnavailable]],
    platform: Platform,
    plugins: Plugins,
) -> BackendUnavailable:
    lines = [f"\n  {error.message}" for _, error in refusals]
    lines += _reasons(found)
    lines += [
        f"\n  {c.entry.name} ({c.provided.source}): used only when named [--attention-backend {c.entry.name}]"
        for c in found
        if isinstance(c.verdict, Usable) and c.verdict.named_only
    ]
    return BackendUnavailable(
        f"no attention backend is usable on {platform.device_type} ({platform.arch}):"
        + ("".join(lines) or " no plugin offers one")
        + quote_failures(plugins.failures),
        fix=hint(found, platform) or "l4 backends",
    )
