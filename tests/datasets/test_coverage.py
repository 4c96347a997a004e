"""Coverage: the numbers of datasets whose distribution is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.datasets import Dataset, Episode
from omcda_deploy.datasets.coverage import coverage, effective_number
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.datasets.summary import render_table, summarize
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

SPEC = TeamSpec(
    "test/coverage",
    tuple(AgentSpec(f"agent_{i}", 3, ActionSpec("continuous", 1)) for i in range(2)),
    state_size=6,
    control_rate=10.0,
)


def recorded(path: Path, lengths: dict[str, int]) -> Dataset:
    """One episode per label; the entries are x, -5x, 3y, x + y and constants; the signs x and y are independent."""
    with DatasetWriter(path, SPEC, {"behavior": "test"}) as writer:
        for label, length in lengths.items():
            t = np.arange(length + 1)
            x, y, rest = np.where(t % 2, 1, -1), np.where(t // 2 % 2, 1, -1), np.full(length + 1, 7)
            entries = np.stack([x, -5 * x, 3 * y, x + y, rest, rest], 1).astype(np.float32)
            actions = np.stack([np.full(length, 0.3), 0.5 * y[:-1]], 1)[..., None]
            episode = Episode(entries.reshape(-1, 2, 3), entries, actions, np.ones(length), timeout=False)
            writer.append(episode, label)
    return read(path)


def test_copies_count_once_and_correlated_entries_less(tmp_path: Path) -> None:
    """x, y and x + y correlate by 0 and sqrt(1/2), with eigenvalues 2, 1 and 0: (2 + 1)^2 / (4 + 1) = 1.8."""
    numbers = coverage(recorded(tmp_path / "d.hdf5", {"a": 400}))
    assert (numbers["observation_entries"], numbers["distinct_observation_entries"]) == (6, 3)
    assert numbers["effective_dimensions"] == pytest.approx(1.8)
    assert numbers["action_spread"]["agent_0"] == pytest.approx([0.0])
    assert numbers["action_spread"]["agent_1"] == pytest.approx([0.5])
    assert numbers["policies"] == 1.0


def test_policies_count_by_their_transitions(tmp_path: Path) -> None:
    """Shares of 1/2, 1/4 and 1/4 have an entropy of 1.5 bits."""
    dataset = recorded(tmp_path / "d.hdf5", {"a": 80, "b": 40, "c": 40})
    assert coverage(dataset)["policies"] == pytest.approx(2**1.5)
    table = render_table(summarize(dataset))
    labels, values = (list(column.cells) for column in table.columns)
    assert values[labels.index("effective number of policies")] == "2.8"
    assert values[labels.index("distinct observation entries")] == "3 of 6"
    assert values[labels.index("spread of agent_1's actions")] == "0.50 (sd)"


def test_effective_numbers() -> None:
    assert effective_number(np.array([3, 3, 0, 3])) == pytest.approx(3.0)
    assert effective_number(np.array([0, 9])) == pytest.approx(1.0)
