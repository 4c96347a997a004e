"""Shipped behaviour policies: a task's tiers are those that lie on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.play import shipped
from omcda_deploy.play.shipped import behavior_policies, shipped_tasks, sources, tiers

TASK = "mamujoco/hopper-3x1"


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped policies that has one task with one tier."""
    monkeypatch.setattr(shipped, "POLICIES", tmp_path)
    (tmp_path / "README.md").touch()
    add(tmp_path, f"{TASK}/medium")
    (tmp_path / "smax" / "corridor" / "good").mkdir(parents=True)  # without a bundle
    return tmp_path


def add(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "bundle.json").touch()


def test_tiers_are_folders_with_bundles(policies: Path) -> None:
    assert shipped_tasks() == (TASK,)
    assert tiers(TASK) == ("medium",)
    assert tiers("smax/corridor") == ()
    assert tiers("toy/chain") == ("behavior",)
    add(policies, "smax/corridor/poor")
    assert shipped_tasks() == (TASK, "smax/corridor")
    assert tiers("smax/corridor") == ("poor",)


def test_a_tier_of_several_bundles_records_them_in_order(policies: Path) -> None:
    for index in (1, 0):
        add(policies, f"{TASK}/medium-replay/0{index}")
    assert tiers(TASK) == ("medium", "medium-replay")
    replay = behavior_policies(TASK, "medium-replay")
    assert [policy.label for policy in replay] == ["medium-replay/00", "medium-replay/01"]
    assert [policy.bundle for policy in replay] == [
        policies / TASK / "medium-replay" / name for name in ("00", "01")
    ]
    assert [policy.share for policy in replay] == [1.0, 1.0]


def test_medium_and_expert_mix(policies: Path) -> None:
    with pytest.raises(UnknownNameError, match="'medium-expert': did you mean 'medium'"):
        behavior_policies(TASK, "medium-expert")
    add(policies, f"{TASK}/expert")
    assert tiers(TASK) == ("expert", "medium", "medium-expert")
    mixture = behavior_policies(TASK, "medium-expert")
    assert [(policy.label, policy.share) for policy in mixture] == [("medium", 0.5), ("expert", 0.5)]


def test_tasks_without_shipped_policies(policies: Path) -> None:
    with pytest.raises(ConfigError, match="comes without behaviour policies"):
        behavior_policies("smax/corridor", "good")
    with pytest.raises(ConfigError, match="comes without behaviour policies"):
        behavior_policies("mamujoco", "hopper-3x1")
    with pytest.raises(UnknownNameError, match="tier of toy/chain 'medium': known are behavior"):
        sources("toy/chain", "medium")
