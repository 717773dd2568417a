"""What a backend asked for in its verdict is what the engine hands it: rings and the chunk, dense pages, and the same tokens come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.recording import greedy
from l4core import LLM

PLUGIN = '''
from dataclasses import replace

import l4core.plugin_api as api
from l4core.attention.chunked import single_chunk_metadata
from l4core.attention.reference import ReferenceBackend


class Ring(ReferenceBackend):
    """Cuts the chunk itself, from the ring it is given."""

    def plan(self, meta):
        if meta.chunk is None:
            return super().plan(meta)
        return super().plan(replace(single_chunk_metadata(meta, meta.block_table, meta.chunk.size, self._page_size), chunk=None))


class Dense(ReferenceBackend):
    """Refuses memory whose pages lie apart."""

    def attend(self, q, kv, plan, out):
        assert kv.k.is_contiguous() and kv.v.is_contiguous()
        super().attend(q, kv, plan, out)


def create_ring(ctx):
    return Ring(ctx.page_size)


def create_dense(ctx):
    return Dense(ctx.page_size)


@api.hookimpl
def l4_attention_backends():
    def usable(**fields):
        return lambda platform, req: api.Usable(tier=api.Tier.REFERENCE, preferred_page_size=16, **fields)

    return [
        api.AttentionBackendEntry(name="ring", api=1, probe=usable(native_chunk=True), create="views_plugin:create_ring"),
        api.AttentionBackendEntry(name="dense", api=1, probe=usable(page_stride="dense"), create="views_plugin:create_dense"),
    ]
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third-party distribution on the path, found by its entry point like any other."""
    (tmp_path / "views_plugin.py").write_text(PLUGIN)
    info = tmp_path / "views_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: views-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[l4core]\nviews = views_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("backend", ["ring", "dense"])
def test_the_same_tokens_over_two_borders(tiny: Path, backend: str) -> None:
    """Three requests, lengths on both sides of the chunk of 64, 80 greedy tokens each; small prefill pieces."""
    prompts = [[7 * i % 256 for i in range(n)] for n in (5, 63, 130)]
    answers = {}
    for name in (backend, "reference"):
        llm = LLM(
            tiny.as_posix(),
            dtype="float32",
            device="cpu",
            attention_backend=name,
            page_size=16,
            chunked_prefill_size=40,
            progress=False,
        )
        answers[name] = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy(80))]
    assert answers[backend] == answers["reference"]
