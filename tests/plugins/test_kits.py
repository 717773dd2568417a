"""The kits find what they are for: each is run on plugins with one fault, and must fail in the test that names it."""

from __future__ import annotations

from typing import Any

import pytest

from l4core.testing.conformance import (
    AttentionConformance,
    ChatTemplateConformance,
    Heads,
    ProbeConformance,
    SamplerConformance,
)
from plugins.site import Site

PROBES = {
    "raises": ("raise KeyError(platform.arch)", "test_probe_never_raises_and_refuses_with_a_reason"),
    "no verdict": ("return True", "test_probe_never_raises_and_refuses_with_a_reason"),
    "no reason": ("return Unusable(reason=' ')", "test_probe_never_raises_and_refuses_with_a_reason"),
    "at least": (
        "return Usable(tier=Tier.NATIVE if platform.arch > 'sm8' else Tier.PORTABLE)",
        "test_an_unknown_architecture_is_never_native",
    ),
    "raw tier": ("return Usable(tier=20)", "test_usable_verdicts_are_well_formed"),
    "memory": ("SEEN.append(1); return Unusable(reason=str(len(SEEN)))", "test_probe_is_a_function_of_its_arguments"),
    "heavy": ("import numpy; return Unusable(reason=numpy.__version__)", "test_importing_and_probing_is_light"),
}
PROBE_PLUGIN = """
from l4core.plugin_api import *
from l4core.plugin_api import hookimpl
SEEN = []
def probe(platform, requirements):
    {body}
@hookimpl
def l4_attention_backends():
    return [AttentionBackendEntry(name="faulty", api={api}, probe=probe, create="faulty_plugin:create")]
"""

ATTENTION = {
    "reads unowned slots": (
        "inner.attend(q, kv, plan, out); out += 0 * kv.v[1:].sum()",
        "test_equals_the_definition",
    ),
    "dense pages": (
        "kv = KVView(k=kv.k.as_strided(kv.k.shape, kv.k.contiguous().stride()), v=kv.v); inner.attend(q, kv, plan, out)",
        "test_equals_the_definition",
    ),
    "packed queries": (
        "q = q.as_strided(q.shape, (q.shape[1] * q.shape[2], q.shape[2], 1)); inner.attend(q, kv, plan, out)",
        "test_equals_the_definition",
    ),
    "last plan": ("inner.attend(q, kv, LAST[-1], out)", "test_plans_outlive_later_plans"),
    "writes KV": ("inner.attend(q, kv, plan, out); kv.k[0] += 1", "test_inputs_are_only_read"),
    "writes queries": ("inner.attend(q, kv, plan, out); q.mul_(1.5)", "test_inputs_are_only_read"),
    "leans on neighbours": (
        "inner.attend(q, kv, plan, out); out *= 1 + 0.01 * len(plan)",
        "test_a_row_is_the_same_alone",
    ),
}
ATTENTION_PLUGIN = """
from l4core.plugin_api import *
from l4core.plugin_api import hookimpl
from l4core.attention import reference
LAST = []
class Faulty(AttentionBackend):
    def __init__(self, inner):
        self.inner = inner
    def plan(self, meta):
        LAST.append(self.inner.plan(meta))
        return LAST[-1]
    def attend(self, q, kv, plan, out):
        inner = self.inner
        {body}
def create(context):
    return Faulty(reference.create(context))
def probe(platform, requirements):
    if requirements.q_dtype != "float32":
        return Unusable(reason="float32 only")
    return Usable(tier=Tier.REFERENCE)
@hookimpl
def l4_attention_backends():
    return [AttentionBackendEntry(name="faulty", api=1, probe=probe, create="faulty_plugin:create")]
"""

SAMPLERS = {
    "sums over rows": ("return logits - logits[logits.isfinite()].mean()", "test_a_row_does_not_depend_on_others"),
    "forbids all": ("return logits.fill_(float('-inf'))", "test_every_row_keeps_a_token"),
    "allows what was forbidden": ("return logits.nan_to_num(neginf=-5.0)", "test_a_forbidden_token_stays_forbidden"),
    "draws": ("import torch; return logits + torch.rand_like(logits)", "test_same_input_same_output"),
    "half": ("return logits.half()", "test_every_row_keeps_a_token"),
    "changes rows": (
        "[r.output_token_ids.append(1) for r in rows if type(r.output_token_ids) is list]; return logits",
        "test_rows_are_not_changed",
    ),
    "takes anything": ("return logits", "test_bad_arguments_are_value_errors"),
}
SAMPLER_PLUGIN = """
from l4core.plugin_api import *
from l4core.plugin_api import hookimpl
class Faulty(Sampler):
    def parse(self, params):
        if params.sampler_args and {strict}:
            raise ValueError("wanted no arguments")
    def transform(self, logits, rows):
        {body}
@hookimpl
def l4_samplers():
    return [SamplerEntry(name="faulty", api=1, create="faulty_plugin:Faulty")]
"""

TEMPLATES = {
    "splits specials": (
        "[Special(t) if t.startswith('<|') else Text(t) for m in messages for t in re.split(r'(<[|].*?[|]>)', text(m))]",
        "test_user_text_never_becomes_special",
    ),
    "drops the system": (
        "[Text(text(m)) for m in messages if m['role'] != 'system']",
        "test_every_message_is_rendered_in_order",
    ),
    "remembers": (
        "MEMORY.append(1) or [Text(text(m) * len(MEMORY)) for m in messages]",
        "test_rendering_keeps_no_state",
    ),
    "strips": ("[Text(text(m)[1:]) for m in messages]", "test_user_text_never_becomes_special"),
    "no prompt": ("[Text(text(m)) for m in messages]", "test_generation_prompt_comes_last"),
    "prompt first": (
        "[*([Text('assistant')] if add_generation_prompt else []), *(Text(text(m)) for m in messages)]",
        "test_generation_prompt_comes_last",
    ),
    "strings": ("[text(m) for m in messages]", "test_pieces_are_text_special_or_image"),
    "any role": ("[Text(text(m)) for m in messages]", "test_nonsense_is_a_value_error"),
}
TEMPLATE_PLUGIN = """
import re
from l4core.plugin_api import *
from l4core.plugin_api import hookimpl
MEMORY = []
def text(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
class Faulty(ChatTemplate):
    def render(self, messages, *, tools=(), add_generation_prompt=True):
        return {body}
@hookimpl
def l4_chat_templates():
    return [ChatTemplateEntry(name="faulty", api=1, create="faulty_plugin:Faulty")]
"""


def fails(site: Site, kit: type[Any], plugin: str, test: str, **attributes: object) -> str:
    """Run one test of a kit on a plugin with a fault; → the text of its failure, "" when it passes."""
    site.install("faulty-plugin", plugin)
    word = {"SamplerConformance": "sampler", "ChatTemplateConformance": "template"}.get(kit.__name__, "backend")
    faulty = type("TestFaulty", (kit,), {"plugin": "faulty_plugin", word: "faulty", **attributes})
    method = getattr(faulty(), test)
    cases = [case for mark in getattr(method, "pytestmark", ()) for case in mark.args[1]] or [None]
    for case in cases:
        try:
            method() if case is None else method(case)
        except Exception as error:  # noqa: BLE001  (whatever ends a test is its failure)
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("fault", PROBES)
def test_probe_kit(site: Site, fault: str) -> None:
    body, test = PROBES[fault]
    assert fails(site, ProbeConformance, PROBE_PLUGIN.format(body=body, api=1), test)


def test_probe_kit_reads_the_api(site: Site) -> None:
    plugin = PROBE_PLUGIN.format(body="return Unusable(reason='x')", api=99)
    assert "api 99" in fails(site, ProbeConformance, plugin, "test_entry_is_served_by_this_core")


SMALL = {"heads": (Heads(num_q_heads=4, num_kv_heads=2, head_dim=8),), "page_sizes": (16,)}


@pytest.mark.parametrize("fault", ATTENTION)
def test_attention_kit(site: Site, fault: str) -> None:
    body, test = ATTENTION[fault]
    assert fails(site, AttentionConformance, ATTENTION_PLUGIN.format(body=body), test, **SMALL)


def test_attention_kit_wants_something_usable(site: Site) -> None:
    plugin = ATTENTION_PLUGIN.format(body="pass").replace('!= "float32"', '!= "nothing"')
    assert "float32 only" in fails(site, AttentionConformance, plugin, "test_something_is_usable_here", **SMALL)


@pytest.mark.parametrize("fault", SAMPLERS)
def test_sampler_kit(site: Site, fault: str) -> None:
    body, test = SAMPLERS[fault]
    plugin = SAMPLER_PLUGIN.format(body=body, strict=fault != "takes anything")
    assert fails(site, SamplerConformance, plugin, test)


@pytest.mark.parametrize("fault", TEMPLATES)
def test_template_kit(site: Site, fault: str) -> None:
    body, test = TEMPLATES[fault]
    assert fails(site, ChatTemplateConformance, TEMPLATE_PLUGIN.format(body=body), test)
