"""`l4-ray serve DIR --tp 8 --nnodes 2`: one engine over the nodes of a Ray cluster, with the options of `l4 serve`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from l4core.config import ServerConfig
from l4core.errors import ConfigError, L4Error
from l4core.launch_server import configs


def main(argv: Sequence[str] | None = None) -> None:
    """Serves until SIGINT or SIGTERM; exits with 0, 1 (failed) or 2 (wrong usage)."""
    try:
        _serve(*_arguments(sys.argv[1:] if argv is None else argv))
    except (ConfigError, click.UsageError) as error:
        sys.exit(_tell(error, 2))
    except L4Error as error:
        sys.exit(_tell(error, 1))
    except KeyboardInterrupt:
        sys.exit(0)


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(ours, those of `l4 serve`)."""
    parser = argparse.ArgumentParser(
        prog="l4-ray",
        description="One engine over the nodes of a Ray cluster. Replicas behind one address: serve run l4_ray:app model=DIR replicas=2",
        epilog="All other options are those of `l4 serve` (l4 serve --help). Without --host it listens on the address of rank 0's node.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve")
    serve = commands.add_parser("serve", help="place the ranks and serve", epilog=parser.epilog)
    serve.add_argument(
        "--nnodes", type=int, metavar="N", help="an equal share of the ranks on each of N nodes [as they fit]"
    )
    serve.add_argument(
        "--ray-address", metavar="ADDRESS", help="of the cluster [the one this node is in, or a new one]"
    )
    serve.add_argument("--restarts", type=int, default=10, metavar="N", help="of ranks that are gone, in all [10]")
    return parser.parse_known_args(argv)


def _serve(ours: argparse.Namespace, rest: list[str]) -> None:
    engine, server = configs(rest)
    if ours.nnodes is not None and (ours.nnodes < 1 or engine.tp % ours.nnodes):
        raise ConfigError(f"--tp {engine.tp} ranks on --nnodes {ours.nnodes}: wanted as many on each")
    import ray

    from l4_ray.ranks import PlacedRanks, RankLostError, supervise

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    ray.init(address=ours.ray_address)
    for sig in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
        signal.signal(sig, _interrupt)
    host = None if server.host == ServerConfig().host and not _given(rest, "--host") else server.host
    ranks = PlacedRanks.place(
        engine.tp,
        ["serve", *_without(rest, ("--host", "--port"))],
        gpus=not engine.device.startswith("cpu"),
        nodes=ours.nnodes,
    )
    try:
        url = ranks.start(host, server.port)
        print(f"{'ranks':<16}placed; the server will be at {url}", flush=True)
        ranks.wait_until_ready(url)
        supervise(ranks, lambda: ranks.start(host, server.port), restarts=ours.restarts)
    except RankLostError as error:
        raise L4Error(str(error)) from error
    finally:
        ranks.close()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _given(arguments: Sequence[str], option: str) -> bool:
    return any(argument.split("=")[0] == option for argument in arguments)


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command line without these options and their values."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.split("=")[0] in options:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


def _tell(error: L4Error | click.UsageError, code: int) -> int:
    print(f"error: {error.format_message() if isinstance(error, click.UsageError) else error}", file=sys.stderr)
    return code
