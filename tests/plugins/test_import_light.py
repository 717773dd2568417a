"""Declaring plugins is light: no command pays for torch because a plugin is installed."""

from __future__ import annotations

import pytest

HEAVY = ("torch", "numpy", "triton", "transformers", "tokenizers", "safetensors")
CHECK = f"\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])\n"


@pytest.mark.parametrize(
    "code",
    [
        "import l4core.plugin_api",
        "import l4core.hookspecs, l4core.plugin_compat, l4core.plugin_entries, l4core.plugin_checks",
        "import l4core.builtin_plugins as b\nb.l4_attention_backends(), b.l4_samplers(), b.l4_chat_templates()",
        "from l4core.plugin_manager import load_plugins\nload_plugins({'L4_STRICT_PLUGINS': '1'})",
        "from l4core.testing.platforms import *\nfrom l4core.builtin_plugins import *\n"
        "[probe(fake_platform(n, {}), r) for probe in (probe_sdpa, probe_reference) for n in FAKE_PLATFORMS for r in requirement_grid()]",
        "import l4core.testing.conformance",
    ],
)
def test_nothing_heavy_is_imported(run_python, code: str) -> None:
    assert run_python(code + CHECK).strip() == "[]"


def test_the_check_itself_sees_what_is_heavy(run_python) -> None:
    assert run_python("import numpy" + CHECK).strip() == "['numpy']"
