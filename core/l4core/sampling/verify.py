"""Verification, the one law: at every verified row the target draws its own token exactly as without speculation, and guesses are only compared.

A draft has one row more than guesses: row 0 is the sequence's last token, row i + 1 is guess i. Each row's draw sees that row's own history, the
guesses on its path among it, so a row whose path was right draws what the target would have drawn there alone: same logits, same penalties, same
noise (a function of seed, position and token). Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["accepted_path", "ancestors", "depths", "paths"]


def accepted_path(guesses: Sequence[int], parents: Sequence[int], drawn: Sequence[int | None]) -> list[int]:
    """Rows whose draws are the sequence's next tokens, in order: row 0, then the guess that equals its draw, and so on. The draw of the last row of
    the path is a token that nobody guessed there.

    guesses, parents: as in `Draft`.  drawn: one a row, len(guesses) + 1; None where a row has no token: the path ends there.
    """
    row, path = 0, [0]
    while drawn[row] is not None:
        child = _child(guesses, parents, row, drawn[row])
        if child is None:
            break
        row = child
        path.append(row)
    return path


def paths(guesses: Sequence[int], parents: Sequence[int]) -> list[list[int]]:
    """For each row the guesses that lie before its draw: [] for row 0, then those from the root down to the row's own."""
    found: list[list[int]] = [[]]
    for i, token_id in enumerate(guesses):
        found.append([*found[_parent(parents, i) + 1], token_id])
    return found


def depths(count: int, parents: Sequence[int]) -> list[int]:
    """Of each row of a draft of `count` guesses: how many guesses lie on its path."""
    found = [0]
    for i in range(count):
        found.append(found[_parent(parents, i) + 1] + 1)
    return found


def ancestors(count: int, parents: Sequence[int]) -> list[int]:
    """Of each row of a draft of `count` guesses a bitmap of the rows on its path, its own among them: bit j = row j."""
    found = [1]
    for i in range(count):
        found.append(found[_parent(parents, i) + 1] | 1 << (i + 1))
    return found


def _parent(parents: Sequence[int], guess: int) -> int:
    return parents[guess] if parents else guess - 1


def _child(guesses: Sequence[int], parents: Sequence[int], row: int, token_id: int | None) -> int | None:
    """Row of the guess after `row` that equals the token drawn there, None when there is none."""
    if not parents:
        return row + 1 if row < len(guesses) and guesses[row] == token_id else None
    for guess in range(row, len(guesses)):
        if parents[guess] == row - 1 and guesses[guess] == token_id:
            return guess + 1
    return None
