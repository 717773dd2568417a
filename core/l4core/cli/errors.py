"""How a command ends badly: `error: …` and `fix: …` on stderr, exit code 2 for wrong usage and 1 for everything else, no traceback."""

from __future__ import annotations

import difflib
import itertools
import sys
import traceback
from collections.abc import Iterable, Sequence

import click

from l4core.cli.elsewhere import fix_for
from l4core.errors import ConfigError, L4Error

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def run(command: click.Command, argv: Sequence[str], *, program: str) -> int:
    """Run a command → exit code. Errors that L4 raises on purpose are printed; any other exception is a bug and keeps its traceback."""
    try:
        result = command.main(args=list(argv), prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:  # `l4` alone: the help is the answer
        print(error.format_message(), file=sys.stderr)
        return USAGE
    except click.UsageError as error:
        show(*explain(error, program))
        return USAGE
    except click.ClickException as error:
        show(error.format_message(), "")
        return FAILED
    except L4Error as error:
        if wants_debug(argv):
            traceback.print_exc()
        show(error.message, error.fix)
        return USAGE if isinstance(error, ConfigError) else FAILED
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    return result if isinstance(result, int) else 0  # click returns an exit code here after --help and --version


def show(message: str, fix: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    if fix:
        print(f"fix: {fix}", file=sys.stderr)


def explain(error: click.UsageError, program: str) -> tuple[str, str]:
    """(what is wrong, what to type instead) in our words."""
    where = error.ctx.command_path if error.ctx is not None else program
    if isinstance(error, click.NoSuchOption):
        likely = nearest(error.option_name, error.possibilities or (), f"{where} --help")
        return f"unknown option {error.option_name}", fix_for(error.option_name) or likely
    return error.format_message(), f"{where} --help"


def nearest(wanted: str, names: Iterable[str], otherwise: str) -> str:
    """The fix for an unknown name: the one most like it, or the command that lists them all."""
    near = difflib.get_close_matches(wanted, list(names), n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} lists them all"


def wants_debug(argv: Sequence[str]) -> bool:
    """Whether `--log-level debug` is on the command line; read by hand because the error may be that it did not parse."""
    words = [word.replace("_", "-") for word in argv]
    return "--log-level=debug" in words or ("--log-level", "debug") in itertools.pairwise(words)
