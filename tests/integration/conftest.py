"""One real server for the tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from helpers.serving import serve


@pytest.fixture(scope="session")
def server(tiny: Path) -> Iterator[str]:
    """Address of a server of the tiny checkpoint, under the name "tiny"."""
    arguments = [tiny.as_posix(), "--served-model-name", "tiny", "--dtype", "float32", "--device", "cpu", "--port", "0"]
    with serve(arguments) as (url, _):
        yield url


@pytest.fixture
def client(server: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client
