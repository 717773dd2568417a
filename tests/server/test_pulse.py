"""Which rank has been silent for too long, in looks."""

from __future__ import annotations

from l4core.parallel.place import local_layout
from l4core.server.pulse import Pulse


def looks(pulse: Pulse, count: int) -> list[int | None]:
    return [pulse.look() for _ in range(count)]


def test_twice_the_time_out_is_too_long() -> None:
    """From a rank's first sign on: before it, ranks wait for each other."""
    pulse = Pulse(local_layout(2, 3.0).places)
    assert pulse.seconds == 6.0
    assert looks(pulse, 100) == [None] * 100
    pulse.beat(1)
    assert looks(pulse, 20) == [None] * 20
    pulse.beat(1)
    pulse.beat(0)
    assert looks(pulse, 21) == [None] * 20 + [1]


def test_a_short_time_out_leaves_time_to_end() -> None:
    assert Pulse(local_layout(2, 0.5).places).seconds == 4.0


def test_one_that_beats_is_let_be() -> None:
    pulse = Pulse(local_layout(2, 3.0).places)
    for _ in range(100):
        pulse.beat(0)
        assert pulse.look() is None
