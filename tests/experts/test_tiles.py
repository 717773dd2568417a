from __future__ import annotations

import pytest

from l4core.experts.tiles import Tiles, tiles_for


@pytest.mark.parametrize("inter", [8192, 4096, 2048, 1024])
@pytest.mark.parametrize("experts", [16, 128])
def test_the_released_models_and_their_shards_have_measured_tiles(experts: int, inter: int) -> None:
    tiles = tiles_for("sm90", experts, 5120, inter, "bfloat16")
    assert tiles != tiles_for("sm90", experts, 5120 + 64, inter, "bfloat16")
    assert len(tiles.rows) >= 6


def test_another_number_of_experts_takes_a_tile_at_as_many_rows_an_expert() -> None:
    scout, other = (tiles_for("sm90", experts, 5120, 8192, "bfloat16") for experts in (16, 32))
    for tokens in (1, 8, 32):
        assert other.row(tokens) == scout.row(tokens)
    for tokens in (100, 500, 2000, 10_000):
        assert other.row(2 * tokens).gate_up == scout.row(tokens).gate_up


def test_maverick_has_tiles_of_its_own() -> None:
    """On one rank of eight an expert of 128 has a sixteenth of the rows that one of 16 has on the whole: small blocks last longer."""
    maverick, scout = (tiles_for("sm90", experts, 5120, 1024, "bfloat16") for experts in (128, 16))
    assert maverick.row(2048).gate_up.rows == 32
    assert scout.row(2048).gate_up.rows == 128
    assert maverick.row(8) == scout.row(8)


@pytest.mark.parametrize("experts", [1, 4])
def test_few_experts_keep_the_order_of_rows(experts: int) -> None:
    bounds = [row.tokens for row in tiles_for("sm90", experts, 5120, 8192, "bfloat16").rows]
    assert bounds == sorted(set(bounds))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942", "bmg_g21"])
def test_every_number_of_tokens_has_a_row_that_holds_it(arch: str, dtype: str) -> None:
    """The path without sorting keeps all tokens in one tile."""
    tiles = tiles_for(arch, 16, 5120, 8192, dtype)
    bounds = [row.tokens for row in tiles.rows]
    assert bounds == sorted(set(bounds))
    for row in tiles.rows:
        assert not row.few or row.tokens <= min(row.gate_up.rows, row.down.rows)
    assert_last_row_serves_the_rest(tiles)


def assert_last_row_serves_the_rest(tiles: Tiles) -> None:
    assert not tiles.rows[-1].few
    assert tiles.row(10**6) == tiles.rows[-1]
    assert tiles.row(1) == tiles.rows[0]


def test_only_hopper_is_told_to_use_its_copy_engine() -> None:
    for arch in ("sm80", "gfx942"):
        assert not any(row.gate_up.tma or row.down.tma for row in tiles_for(arch, 16, 5120, 8192, "bfloat16").rows)
