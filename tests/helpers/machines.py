"""Two machines on one: network namespaces with addresses and a loopback of their own, a line between them that can be cut, and one to each from here.

Needs root and `ip`; `why_not()` says what is missing. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """name: of the namespace.  link: its device on the line between the two.  address: on that line.  outside: its address for this process."""

    name: str
    link: str
    address: str
    outside: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs `arguments` on it."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def cut(self) -> None:
        """Its end of the line goes down: packets are lost, nobody is told."""
        _ip("-n", self.name, "link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("-n", self.name, "link", "set", self.link, "up")


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Until the block is left."""
    number = next(_numbers)
    tag = f"{os.getpid() % 0xFFFFF:x}{number % 16:x}"
    net = 16 + (os.getpid() + number) % 200
    made = [
        Machine(
            name=f"l4-{tag}-{which}",
            link=f"l{tag}{which}",
            address=f"10.{net}.0.{index + 1}",
            outside=f"10.{net}.{index + 1}.2",
        )
        for index, which in enumerate("ab")
    ]
    first, second = made
    try:
        for machine in made:
            _ip("netns", "add", machine.name)
            _ip("-n", machine.name, "link", "set", "lo", "up")
        _ip(
            "link",
            "add",
            first.link,
            "netns",
            first.name,
            "type",
            "veth",
            "peer",
            "name",
            second.link,
            "netns",
            second.name,
        )
        for index, machine in enumerate(made):
            here, there = f"h{machine.link}", f"o{machine.link}"
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.link)
            machine.mend()
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", machine.name)
            _ip("addr", "add", f"10.{net}.{index + 1}.1/24", "dev", here)
            _ip("link", "set", here, "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.outside}/24", "dev", there)
            _ip("-n", machine.name, "link", "set", there, "up")
        yield first, second
    finally:
        for machine in made:  # its devices go with it, and their other ends
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


@functools.cache
def why_not() -> str:
    """Why two machines cannot be made here, "" where they can."""
    try:
        with two_machines():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces are not permitted here: {said}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
