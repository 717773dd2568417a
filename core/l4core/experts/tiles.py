"""Tile sizes of the Triton experts, as plain numbers: what was measured stands in tiles.json, the rest follows a rule. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

FEW_ROWS = (16, 32, 64)
"""Row tiles of the path for few tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """rows: tokens.  columns: outputs (of gate and of up each).  inputs: of one step.  swap: weights are the left operand, for few rows.
    group: blocks of rows that go through the columns together, for many rows.  tma: operands come by the device's copy engine (NVIDIA's, from
    Hopper on), for many rows.  half: rows that are computed where a block has no more, 0 = always all.  extra: how many rows more a block may have,
    with tma only.  warps, stages: as Triton counts them."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int
    swap: bool = False
    group: int = 8
    tma: bool = False
    half: int = 0
    extra: int = 0

    def constants(self, *, grouped: bool = False) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        shape: dict[str, Any] = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.inputs}
        if grouped:
            shape |= {"GROUP": self.group, "TMA": self.tma, "HALF": self.half, "EXTRA": self.extra}
        else:
            shape |= {"SWAP": self.swap}
        return shape | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Up to `tokens` tokens in a call. few: the path without sorting."""

    tokens: int
    few: bool
    gate_up: Tile
    down: Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """rows: by ascending `tokens`; the last one serves all that are more."""

    rows: tuple[Row, ...]

    def row(self, num_tokens: int) -> Row:
        return next((row for row in self.rows if num_tokens <= row.tokens), self.rows[-1])


def tiles_for(arch: str, num_experts: int, hidden: int, inter: int, dtype: str) -> Tiles:
    """What was measured for this architecture and hidden size (2-byte dtypes) at the nearest number of experts, then the nearest intermediate size;
    else what the device's family does well with."""
    if dtype != "float32" and inter % 8 == 0:  # the copy engine wants rows of whole 16 bytes
        found = [one for one in _measured() if (one["arch"], one["hidden"]) == (arch, hidden)]
        if found:
            nearest = min(found, key=lambda one: (_apart(one["num_experts"], num_experts), _apart(one["inter"], inter)))
            return _for_experts(nearest, num_experts)
    return _rule(arch, num_experts, dtype)


def _apart(a: int, b: int) -> float:
    return abs(math.log(a / b))


def _for_experts(found: Mapping[str, Any], num_experts: int) -> Tiles:
    """For many tokens a tile is good for a number of rows an expert, so its bounds grow with the number of experts."""
    scale = num_experts / found["num_experts"]
    rows = [_row(row) for row in found["rows"]]
    few = [row for row in rows if row.few]
    many = [
        replace(row, tokens=max(int(row.tokens * scale), few[-1].tokens + 1 + i))
        for i, row in enumerate(rows[len(few) :])
    ]
    return Tiles(rows=(*few, *many))


def _measured() -> Sequence[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = json.loads(
        resources.files("l4core.experts").joinpath("tiles.json").read_text(encoding="utf-8")
    )["tiles"]
    return found


def _row(row: Mapping[str, Any]) -> Row:
    return Row(tokens=row["tokens"], few=row["few"], gate_up=Tile(**row["gate_up"]), down=Tile(**row["down"]))


def _rule(arch: str, num_experts: int, dtype: str) -> Tiles:
    """16 rows are the least a matrix instruction takes; a block of many rows fills the tensor cores."""
    big = arch in ("sm90", "sm100", "sm103")
    if dtype == "float32":  # dots without tensor cores: registers decide
        few = [Row(tokens=n, few=True, gate_up=_tile(n, 16, 32, 4, 2), down=_tile(n, 16, 32, 4, 2)) for n in (16,)]
        return Tiles(
            rows=(*few, Row(tokens=1 << 30, few=False, gate_up=_tile(32, 32, 32, 4, 2), down=_tile(32, 32, 32, 4, 2)))
        )
    stages, inputs = (4, 128) if big or arch == "sm80" else (2, 64)
    few = [
        Row(tokens=n, few=True, gate_up=_tile(n, 32, inputs, 4, stages), down=_tile(n, 32, inputs, 4, stages))
        for n in FEW_ROWS
    ]
    some = _tile(32, 64, inputs, 4, 3 if stages == 4 else 2)
    many = _tile(128, 128, 64, 8, 3) if big else _tile(64, 64, 32, 4, 2)
    wide = _tile(128, 256, 64, 8, 3) if big else _tile(64, 128, 32, 4, 2)
    return Tiles(
        rows=(
            *few,
            Row(tokens=32 * num_experts, few=False, gate_up=some, down=some),
            Row(tokens=1 << 30, few=False, gate_up=many, down=wide),
        )
    )


def _tile(rows: int, columns: int, inputs: int, warps: int, stages: int) -> Tile:
    return Tile(rows=rows, columns=columns, inputs=inputs, warps=warps, stages=stages)
