"""What ranks compare before they start."""

from __future__ import annotations

import importlib.metadata

import pytest

from l4core.config import EngineConfig
from l4core.engine.process.identity import device_identity, program_identity
from l4core.parallel.rendezvous import difference


@pytest.mark.parametrize(
    ("version", "text"), [("0.9", "plugin l4-moon is 0.9 there, and 1.0 here"), (None, "is nothing")]
)
def test_plugins_are_compared(monkeypatch: pytest.MonkeyPatch, version: str | None, text: str) -> None:
    """A sampler that only one rank knows would be refused on the others, which then wait for ever."""

    def there(version: str | None) -> dict[str, str]:
        point = importlib.metadata.EntryPoint("moon", "moon", "l4core")
        found = [] if version is None else [point._for(_Distribution(version))]  # type: ignore[attr-defined]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda **group: found)
        return program_identity(EngineConfig())

    assert difference("rank 1", there("1.0"), there("1.0")) is None
    problem = difference("rank 1", there("1.0"), there(version))
    assert problem is not None
    assert text in problem[0]


def test_an_automatic_device_is_compared_by_what_it_is() -> None:
    assert device_identity(EngineConfig(device="cpu")) == {"the device": "cpu"}


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, version: str) -> None:
        self._text = f"Name: l4-moon\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: object) -> object:  # type: ignore[override]
        raise FileNotFoundError(path)
