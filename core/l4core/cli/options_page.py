"""docs/options.md, generated: `python -m l4core.cli.options_page > docs/options.md`. A test compares the two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from l4core.cli.elsewhere import ELSEWHERE
from l4core.cli.options import METAVARS, value_type
from l4core.config import EngineConfig, ServerConfig
from l4core.option import Option, options

HEAD = """# Options

Generated from the table in `core/l4core/config.py` by `python -m l4core.cli.options_page`; do not edit.

Every option has one name. `l4 serve`, `l4 generate`, `l4 chat` and `python -m l4core.launch_server` take it as a flag (`--context-length`,
with `-` or `_`), a YAML file for `--config` as a key (`context_length`), and `LLM(...)` as a keyword (the groups before "Server", but of
"Parallelism" the first three). The other spellings are those of SGLang and vLLM and mean the same. A yes/no option is a flag; `--no-…` takes back
what a file sets.

A flag beats the environment, and that beats the file. An unknown name is an error that names the nearest one, and so is an option given twice.
"""


def render() -> str:
    """The whole page."""
    groups: dict[str, list[str]] = {}
    for cls in (EngineConfig, ServerConfig):
        defaults = cls()
        for name, hint, row in options(cls):
            groups.setdefault(row.group, []).append(table_row(name, hint, row, getattr(defaults, name)))
    tables = [
        f"## {group}\n\n| option | other spellings | value | default | what it does |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        for group, rows in groups.items()
    ]
    return "\n\n".join([HEAD.strip(), *tables, elsewhere()]) + "\n"


def elsewhere() -> str:
    """What others' flags become here."""
    rows = "\n".join(f"| `--{name.replace('_', '-')}` | {fix} |" for name, fix in ELSEWHERE.items())
    head = "## Flags of SGLang and vLLM that are not here\n\nEach is refused with this line.\n\n| flag | what to do |\n| --- | --- |\n"
    return head + rows


def table_row(name: str, hint: Any, row: Option, default: Any) -> str:
    """One option as a row of a Markdown table."""
    flags = ", ".join(f"`--{alias.replace('_', '-')}`" for alias in row.aliases)
    shown = "" if default in (None, "", ()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    text = f"{row.help}. *Refused for now:* {row.not_built}." if row.not_built else row.help
    cells = (f"`{name}`", flags, value_of(hint, row), shown, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def value_of(hint: Any, row: Option) -> str:
    """What may stand behind the option, with its unit and range."""
    kind = value_type(hint)
    if kind is bool:
        return "flag"
    if row.choices:
        return " ".join(f"`{choice}`" for choice in row.choices)
    parts = (row.metavar or row.unit or METAVARS[kind], *bounds(row), "or `auto`" if row.auto else "")
    return ", ".join(part for part in parts if part)


def bounds(row: Option) -> Iterator[str]:
    """The range in words, in one part or two."""
    low, above, high = row.minimum, row.above, row.maximum
    if low is not None and high is not None:
        yield f"{low:g} to {high:g}"
        return
    if low is not None:
        yield f"at least {low:g}"
    if above is not None:
        yield f"above {above:g}"
    if high is not None:
        yield f"at most {high:g}"


if __name__ == "__main__":
    print(render(), end="")
