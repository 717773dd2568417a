"""`l4-ray serve DIR --tp 8 --nnodes 2`: one engine over the nodes of a Ray cluster, with the options of `l4 serve`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import click

from l4core.errors import ConfigError, L4Error
from l4core.launch_server import configs


def main(argv: Sequence[str] | None = None) -> None:
    """Serves until Ctrl-C; exits with 0, 1 (failed) or 2 (wrong usage)."""
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
    ray.init(address=ours.ray_address, ignore_reinit_error=True)
    given = [name for name in rest if name.split("=")[0] == "--host"]
    host = server.host if given else None
    gpus = not engine.device.startswith("cpu")
    ranks = PlacedRanks.place(engine.tp, ["serve", *rest], gpus=gpus, nodes=ours.nnodes)
    try:
        print(f"{'ranks':<16}placed; the server will be at {ranks.start(host, server.port)}", flush=True)
        supervise(ranks, lambda: ranks.start(host, server.port), restarts=ours.restarts)
    except RankLostError as error:
        raise L4Error(str(error)) from error
    finally:
        ranks.close()


def _tell(error: L4Error | click.UsageError, code: int) -> int:
    print(f"error: {error.format_message() if isinstance(error, click.UsageError) else error}", file=sys.stderr)
    return code
