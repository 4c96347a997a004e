"""An evaluation or a replay has one version of a bundle, whatever operators switch meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy import registry
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.errors import ContractError
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.play.replay import replay
from omcda_deploy.report.measurements import origin, version_line
from tests.play.test_replay import StubTeam, recorded
from tests.support.bundles import write_test_bundle
from tests.support.server_process import free_port, server_process

TASK = "toy/chain-mixed"
EPISODES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    for version in ("1", "2"):
        write_test_bundle(folder / version, registry.team_spec(TASK), seed=int(version))
    (folder / "current").write_text("1\n\n")
    return folder


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[str, TeamAdmin]]:
    """The address of a server of all agents, whose current version is 1, and its operator."""
    port = free_port()
    spec = registry.team_spec(TASK)
    with (
        server_process(folder, *spec.names, options=("--admin-port", str(port))) as server,
        TeamAdmin([f"127.0.0.1:{port}"]) as admin,
    ):
        yield server.endpoint, admin
        admin.switch("1")


def switching(admin: TeamAdmin, after: int) -> Callable[[float, float], None]:
    """Return a progress callback that switches to version 2 after a number of steps."""
    steps = iter(range(1, 1_000_000))

    def progress(done: float, total: float) -> None:
        if next(steps) == after:
            admin.switch("2")

    return progress


def test_an_evaluation_stays_with_its_version(folder: Path, served: tuple[str, TeamAdmin]) -> None:
    endpoint, admin = served
    local = [evaluate(LocalTeam(folder / v), TASK, episodes=EPISODES, num_envs=1) for v in ("1", "2")]
    assert local[0].returns.tolist() != local[1].returns.tolist()
    with RemoteTeam([endpoint]) as team:
        first = evaluate(team, TASK, episodes=EPISODES, num_envs=1, progress=switching(admin, 3))
        second = evaluate(team, TASK, episodes=EPISODES, num_envs=1)  # begins after the switch
    for version, result, expected in (("1", first, local[0]), ("2", second, local[1])):
        assert result.returns.tolist() == expected.returns.tolist()
        assert (result.team.version, result.team.bundle_digest) == (version, expected.team.bundle_digest)
        written = json.loads(json.dumps(result.to_json()))["team"]
        assert (written["version"], written["bundle_digest"]) == (version, expected.team.bundle_digest)
        assert f"version {version}, bundle {written['bundle_digest'][:12]}" in version_line(result)
        assert origin(result)["Bundle"] == f"{written['bundle_digest']}, version {version}"
    assert version_line(local[0]) == ""
    assert "version" not in local[0].to_json()["team"]


def test_a_replay_stays_with_its_version(folder: Path, served: tuple[str, TeamAdmin]) -> None:
    endpoint, admin = served
    dataset: Any = recorded(registry.team_spec(TASK))
    with RemoteTeam([endpoint]) as team:
        result = replay(team, dataset, local=LocalTeam(folder / "1"), progress=switching(admin, 5))
    assert result.parity is not None
    assert result.parity.exact
    assert result.team.version == "1"


def test_a_team_that_changes_by_itself_is_not_measured_as_one() -> None:
    class Changing(StubTeam):
        divergence_kind, budgets = "kl", {"left": None, "right": None}
        bundle_digest = "one"

        def reset(self) -> None:
            self.bundle_digest = "one" if not self.seen else "two"

    with pytest.raises(ContractError, match=r"step 5 was answered by bundle two, those before by one"):
        replay(Changing(), recorded())
