"""examples/: pip installs each as a third party's package, and it is found, chosen by name and does its work."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from helpers.packages import pip_install

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All examples, installed by pip into one folder, without the network."""
    folder = tmp_path_factory.mktemp("examples")
    pip_install(folder, *PACKAGES)
    return folder


def test_there_is_one_example_per_kind_of_plugin() -> None:
    assert [path.name for path in PACKAGES] == [
        "l4-bigram-drafter",
        "l4-block-attention",
        "l4-chatml-template",
        "l4-xtc-sampler",
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_layout(package: Path) -> None:
    """Own metadata, one entry point, the import name of the distribution, a README, tests; imports of l4core are public ones."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    assert project["name"] == package.name
    assert list(project["entry-points"]["l4core"].values()) == [module]
    assert (package / "README.md").is_file()
    assert list((package / "tests").glob("test_*.py"))
    for source in (package / module).glob("*.py"):
        for line in source.read_text().splitlines():
            if line.lstrip().startswith(("from l4core", "import l4core")):
                assert line.split()[1].startswith(("l4core.plugin_api", "l4core.plugin_ops")), f"{source.name}: {line}"


def test_all_load_in_strict_mode_without_torch(target: Path, run_python) -> None:
    code = """
        import sys
        from l4core.plugin_manager import load_plugins
        plugins = load_plugins({"L4_STRICT_PLUGINS": "1"})
        for row in plugins.rows:
            print(row.name, row.version, row.status, "; ".join(row.offers))
        print("torch" in sys.modules)
    """
    lines = run_python(code, target).splitlines()
    assert "l4-block-attention 0.1.0 loaded attention backend block" in lines
    examples = [line for line in lines if line.split()[0] in {path.name for path in PACKAGES}]
    assert len(examples) == len(PACKAGES)
    assert all(" loaded " in line for line in examples)
    assert lines[-1] == "False"


def test_the_attention_example_is_used_when_named_and_only_then(target: Path, run_python) -> None:
    code = """
        from l4core.attention.select import select_backend
        from l4core.errors import L4Error
        from l4core.platform import detect
        from l4core.plugin_api import AttentionRequirements
        from l4core.plugin_manager import load_plugins
        plugins, cpu = load_plugins(), detect("cpu")
        req = AttentionRequirements(
            num_q_heads=6, num_kv_heads=2, head_dim=16, q_dtype="float32", kv_dtype="float32", chunk_size=64, page_size=16
        )
        print(select_backend(plugins, cpu, req, device="cpu").describe())
        named = select_backend(plugins, cpu, req, device="cpu", named="block", options={"block_tokens": "32"})
        print(named.describe(), named.backend.pages_per_block)
        for options in ({"block_tokens": "many"}, {"tokens": "32"}):
            try:
                select_backend(plugins, cpu, req, device="cpu", named="block", options=options)
            except L4Error as error:
                print(type(error).__name__, error.message)
    """
    automatic, named, refused, unknown = run_python(code, target).splitlines()
    assert automatic.startswith(("sdpa (l4core", "cpu (l4-cpu"))
    assert named == "block (l4-block-attention 0.1.0) · reference 2"
    assert refused.startswith(
        "BackendUnavailable attention backend 'block' (l4-block-attention 0.1.0): block_tokens is 'many'"
    )
    assert unknown.startswith(
        "ConfigError --attention-option 'tokens' is not an option of the attention backend 'block'"
    )


def test_the_attention_example_passes_its_kits(target: Path, run_python) -> None:
    tests = str(EXAMPLES / "l4-block-attention" / "tests")
    some = "Probe or usable or decode or verify"  # all of them run as the example's own tests
    flags = ["-q", "-p", "no:cacheprovider", "--rootdir", tests, tests, "-k", some]
    code = f"import pytest, sys; sys.exit(pytest.main({flags!r}))"
    assert " passed" in run_python(code, target)


def test_the_attention_example_is_about_sixty_lines() -> None:
    package = EXAMPLES / "l4-block-attention" / "l4_block_attention"
    lines = [line for path in package.glob("*.py") for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 65
