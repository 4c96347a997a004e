"""The verdict's words follow from returns alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from omcda_deploy.report.verdict import verdict


@dataclass
class Row:
    """The part of an evaluation that the words depend on."""

    temperature: float
    mean: float
    standard_error: float = 10.0
    stalled: float | None = 0.0
    shares: dict[str, float | None] = field(init=False)

    def __post_init__(self) -> None:
        self.returns = np.array([self.mean])
        self.shares = {"stalled": self.stalled, "fell": None, "won": None}


def words(team: list[Row], rival: list[Row]) -> list[str]:
    return verdict(team, rival, ("OMCDA", "BC"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (2000.0, "is ahead of BC 1"),
        (1500.0, "is behind BC 1"),
        (1728.2, "do not differ clearly"),  # within two standard errors of the difference, 2 sqrt(200)
        (1728.4, "is ahead of BC 1"),
        (1671.8, "do not differ clearly"),
        (1671.6, "is behind BC 1"),
    ],
)
def test_ahead_and_behind_need_two_standard_errors(mean: float, said: str) -> None:
    for line in words([Row(0, mean), Row(1, mean)], [Row(0, 1700.0), Row(1, 1700.0)]):
        assert said in line


def test_each_team_is_taken_at_its_own_best_temperature() -> None:
    at_0, at_1, at_best = words(
        [Row(0, 100.0), Row(0.5, 900.0), Row(1, 500.0)], [Row(0, 600.0), Row(0.5, 200.0), Row(1, 500.0)]
    )
    assert at_0 == "At T 0: OMCDA 100.0 ± 10.0 (T 0) is behind BC 600.0 ± 10.0 (T 0) by 500.0."
    assert at_1.endswith("OMCDA 500.0 ± 10.0 (T 1) and BC 500.0 ± 10.0 (T 1) do not differ clearly.")
    assert at_best.endswith("OMCDA 900.0 ± 10.0 (T 0.5) is ahead of BC 600.0 ± 10.0 (T 0) by 300.0.")


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.05, False), (0.1, True), (1.0, True)])
def test_a_mean_action_that_stalls_is_said(share: float | None, said: bool) -> None:
    lines = words([Row(0, 900.0), Row(1, 900.0)], [Row(0, 3.0, stalled=share), Row(1, 900.0, stalled=1.0)])
    assert [line.startswith("BC without noise stalls in ") for line in lines[3:]] == [True] * said


def test_one_episode_has_no_standard_error_and_no_winner() -> None:
    nan = float("nan")
    for line in words([Row(0, 900.0, nan), Row(1, 900.0, nan)], [Row(0, 3.0, nan), Row(1, 3.0, nan)]):
        assert "do not differ clearly" in line
