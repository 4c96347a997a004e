"""A comparison of two teams in words, by rule from their returns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omcda_deploy.formatting import digits_of, number, percent
from omcda_deploy.play.evaluate import Evaluation

CLEAR = 2.0  # standard errors by which means differ that are said to differ
STALLS = 0.1  # share of episodes from which a team is said to stall


def verdict(team: Sequence[Evaluation], rival: Sequence[Evaluation], names: tuple[str, str]) -> list[str]:
    """Say which of two teams, named by ``names``, returns more at T 0, at T 1 and at its best T, and which stalls.

    Both were played at the same temperatures, from 0 to 1. A mean that is less than two standard errors of the
    difference away from the other one is not called ahead or behind.
    """
    best = _best(team), _best(rival)
    pairs = {"At T 0": (team[0], rival[0]), "At T 1": (team[-1], rival[-1]), "Each at its best T": best}
    lines = [f"{when}: {_words(*pair, names)}" for when, pair in pairs.items()]
    for name, rows in zip(names, (team, rival), strict=True):
        share = rows[0].shares["stalled"]
        if share is not None and share >= STALLS:
            lines.append(
                f"{name} without noise stalls in {percent(share)} of its episodes: judge it at other temperatures."
            )
    return lines


def _best(rows: Sequence[Evaluation]) -> Evaluation:
    return max(rows, key=lambda evaluation: evaluation.mean)


def _words(team: Evaluation, rival: Evaluation, names: tuple[str, str]) -> str:
    digits = digits_of(team.returns)
    told = [
        f"{name} {number(row.mean, digits)} ± {number(row.standard_error, digits)} (T {row.temperature:g})"
        for name, row in zip(names, (team, rival), strict=True)
    ]
    difference = team.mean - rival.mean
    if not abs(difference) > CLEAR * math.hypot(team.standard_error, rival.standard_error):
        return f"{' and '.join(told)} do not differ clearly."
    side = "ahead of" if difference > 0 else "behind"
    return f"{told[0]} is {side} {told[1]} by {number(abs(difference), digits)}."
