"""Scores of runs: what their last policies return at several temperatures of play.

docs/evaluation.md says how a score is defined and why. Shapes: S snapshots of a run, K temperatures, E episodes
that are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.play.episodes import Episodes, read_episodes

Values = NDArray[np.float64]


@dataclass(frozen=True)
class SnapshotScore:
    """One policy of a run: ``reported`` and ``selection`` hold its episodes at each of K temperatures."""

    step: int
    sha256: str  # of the policy's file
    reported: tuple[Episodes, ...]  # [K]
    selection: tuple[Episodes, ...]  # [K]


@dataclass(frozen=True)
class Score:
    """The episodes of a run's last policies.

    ``conditions`` are numbers of episodes, seeds and so on, as :meth:`to_json` writes them; ``bundle_digest`` is
    that of the last policy's bundle.
    """

    temperatures: tuple[float, ...]  # [K], ascending
    snapshots: tuple[SnapshotScore, ...]  # [S], by step
    conditions: Mapping[str, Any]
    bundle_digest: str
    versions: Mapping[str, str]
    machine: str
    date: str

    @cached_property
    def returns(self) -> Values:
        """Returns of the reported episodes, [S, K, E]."""
        returns: Values = np.array(
            [[episodes.returns for episodes in snapshot.reported] for snapshot in self.snapshots]
        )
        return returns

    @property
    def values(self) -> Values:
        """The score at each temperature: mean over snapshots and episodes, [K]."""
        values: Values = self.returns.mean(axis=(0, 2))
        return values

    @property
    def selection(self) -> Values:
        """The same mean over the episodes by which a temperature is selected, [K]."""
        return _means([[episodes.mean for episodes in s.selection] for s in self.snapshots])

    @property
    def lengths(self) -> Values:
        """Mean length of the reported episodes, in steps, [K]."""
        return _means([[float(episodes.lengths.mean()) for episodes in s.reported] for s in self.snapshots])

    @property
    def shares(self) -> dict[str, Values | None]:
        """Shares of the reported episodes by outcome, [K]; None for one that the simulator does not report."""
        by_outcome: dict[str, Values | None] = {}
        for name in OUTCOMES:
            shares = [[episodes.shares[name] for episodes in s.reported] for s in self.snapshots]
            known = all(share is not None for row in shares for share in row)
            by_outcome[name] = _means(shares) if known else None
        return by_outcome

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the file beside a run that :meth:`read` reads."""
        return {
            "kind": "score",
            **self.conditions,
            "temperatures": list(self.temperatures),
            "snapshots": [
                {
                    "step": snapshot.step,
                    "sha256": snapshot.sha256,
                    "reported": [episodes.columns() for episodes in snapshot.reported],
                    "selection": [episodes.columns() for episodes in snapshot.selection],
                }
                for snapshot in self.snapshots
            ],
            "team": {"bundle_digest": self.bundle_digest},
            "versions": dict(self.versions),
            "machine": self.machine,
            "date": self.date,
        }

    @classmethod
    def read(cls, values: Mapping[str, Any], conditions: Mapping[str, Any]) -> Score:
        """Read what :meth:`to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""

        def tables(rows: Sequence[Mapping[str, Any]]) -> tuple[Episodes, ...]:
            return tuple(read_episodes(row) for row in rows)

        return cls(
            tuple(values["temperatures"]),
            tuple(
                SnapshotScore(s["step"], s["sha256"], tables(s["reported"]), tables(s["selection"]))
                for s in values["snapshots"]
            ),
            {name: values[name] for name in conditions},
            values["team"]["bundle_digest"],
            values["versions"],
            values["machine"],
            values["date"],
        )


def _means(rows: Sequence[Sequence[float | None]]) -> Values:
    """Mean over snapshots of numbers by temperature, [K]."""
    means: Values = np.array(rows, np.float64).mean(axis=0)
    return means
