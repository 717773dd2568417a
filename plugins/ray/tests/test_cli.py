"""The command line of `l4-ray`: its own options are taken, the others are those of `l4 serve` and are checked before anything is placed."""

from __future__ import annotations

import pytest

from l4_ray.cli import _arguments, _given, _without, main


def test_options_of_ours_and_of_l4_serve() -> None:
    ours, rest = _arguments(
        ["serve", "DIR", "--tp", "4", "--nnodes", "2", "--host=0.0.0.0", "--port", "1", "--ray-address", "a:1"]
    )
    assert (ours.nnodes, ours.ray_address, ours.restarts) == (2, "a:1", 10)
    assert rest == ["DIR", "--tp", "4", "--host=0.0.0.0", "--port", "1"]
    assert _given(rest, "--host")
    assert _without(rest, ("--host", "--port")) == ["DIR", "--tp", "4"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve", "DIR", "--contxt-length", "8"], "--context-length"),
        (["serve"], "no model"),
        (["serve", "DIR", "--tp", "1", "--nnodes", "2"], "as many on each"),
    ],
)
def test_what_cannot_be_is_said_without_ray(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
