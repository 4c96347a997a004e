"""Names of the numbers in observations and actions, in their order: what each number is, and its unit.

A simulator that knows them defines ``entries`` (:class:`omcda_deploy.plugins.WithEntries`). They are no part of a
team's contract: they say how to read its vectors.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NUMBERED = re.compile(r"(.*\D)(\d+)")


@dataclass(frozen=True)
class Entry:
    """One number of an observation, one number of an action, or one choice."""

    of: str  # that it belongs to: a joint, a body, a unit; empty where there is nothing to name
    quantity: str
    unit: str = ""  # as text, with a range where there is one


@dataclass(frozen=True)
class AgentEntries:
    """Entries of one agent: ``observation`` [O] before normalisation, ``action`` [A] numbers or choices."""

    observation: tuple[Entry, ...]
    action: tuple[Entry, ...]


@dataclass(frozen=True)
class EntryRow:
    """Consecutive entries that are told in one line: the same quantities of each of ``of``."""

    first: int
    last: int
    of: tuple[str, ...]
    quantities: tuple[tuple[str, str], ...]  # of each, in order, with units

    @property
    def index(self) -> str:
        """The entries' positions: ``4`` or ``4 to 9``."""
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def owners(self) -> str:
        """The things that the entries belong to: ``thigh, leg`` or ``agent_1 to 5, enemy 0 to 23``."""

        def series(place: tuple[int, str]) -> tuple[str, int]:
            """Return the same for names that are numbered one after another."""
            position, name = place
            found = _NUMBERED.fullmatch(name)
            return (found[1], int(found[2]) - position) if found else (name, -1)

        told = []
        for _, group in itertools.groupby(enumerate(self.of), key=series):
            names = [name for _, name in group]
            if len(names) > 2 and (last := _NUMBERED.fullmatch(names[-1])):
                names = [f"{names[0]} to {last[2]}"]
            told += names
        return ", ".join(told)

    @property
    def description(self) -> str:
        """The quantities of each of them, with equal units told once: ``velocity x, y (m/s), mass (kg)``."""
        told = []
        for unit, group in itertools.groupby(self.quantities, key=lambda pair: pair[1]):
            names = ", ".join(_shortened([name for name, _ in group]))
            told.append(f"{names} ({unit})" if unit else names)
        return ", ".join(told)


def entry_rows(entries: Iterable[Entry]) -> list[EntryRow]:
    """Gather entries into rows, so that hundreds of numbers are told in a few lines."""
    rows: list[EntryRow] = []
    position = 0
    for of, group in itertools.groupby(entries, key=lambda entry: entry.of):
        quantities = tuple((entry.quantity, entry.unit) for entry in group)
        last = position + len(quantities) - 1
        if of and rows and rows[-1].quantities == quantities and rows[-1].of[0]:
            before = rows.pop()
            rows.append(EntryRow(before.first, last, (*before.of, of), quantities))
        else:
            # Numbers that are alike in everything, such as padding, are told once.
            told = quantities[:1] if len(set(quantities)) == 1 else quantities
            rows.append(EntryRow(position, last, (of,), told))
        position = last + 1
    return rows


def axes(of: str, quantity: str, unit: str, names: Sequence[str] = "xyz") -> list[Entry]:
    """List the components of a vector."""
    return [Entry(of, f"{quantity} {name}", unit) for name in names]


def _shortened(names: Sequence[str]) -> list[str]:
    """Leave out the words that a name shares with the one before it, if only the last word differs."""
    short = list(names[:1])
    for before, name in itertools.pairwise(names):
        head, _, tail = name.rpartition(" ")
        short.append(tail if head and head == before.rpartition(" ")[0] else name)
    return short
