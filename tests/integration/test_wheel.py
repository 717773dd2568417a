"""The built wheel is the whole product: nothing of the source tree is needed to serve a chat request."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx

from helpers.packages import ROOT, build_wheel, pip_install
from helpers.serving import serve


def test_an_environment_with_only_the_wheel_serves_a_chat_request(tiny: Path, tmp_path: Path) -> None:
    """The wheel is unpacked into a folder of its own and put before the source tree; its entry points are read from its own metadata."""
    wheel = build_wheel(ROOT, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "l4core/py.typed" in names
        assert not [n for n in names if n.startswith(("tests", "checkpoints", "examples"))]
    site = tmp_path / "site"
    pip_install(site, wheel)
    env = {"PYTHONPATH": site.as_posix(), "PYTHONSAFEPATH": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import l4core; print(l4core.__file__)"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert where.stdout.strip() == (site / "l4core" / "__init__.py").as_posix()
    command = (sys.executable, "-c", "import sys; from l4core.cli import main; sys.exit(main())", "serve")
    with serve(
        [tiny.as_posix(), "--device", "cpu", "--served-model-name", "tiny", "--port", "0"],
        command=command,
        env=env,
        cwd=tmp_path,
    ) as (url, _):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).status_code == 200
