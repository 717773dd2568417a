"""`python -m l4core.launch_server --model-path … --tp … --port 30000`: what SGLang users type. The same command as `l4 serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l4core.cli.errors import run
from l4core.cli.serve import serve
from l4core.cli.settings import read_configs
from l4core.config import EngineConfig, ServerConfig


def configs(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """What such a command line asks for, without serving: for launchers. Raises ConfigError or click's UsageError."""
    with serve.make_context("l4 serve", list(argv)) as ctx:
        return read_configs(ctx)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve; exits with the codes of `l4`."""
    sys.exit(run(serve, sys.argv[1:] if argv is None else argv, program="python -m l4core.launch_server"))


if __name__ == "__main__":
    main()
