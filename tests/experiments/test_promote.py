"""Promotion on evidence, on a real server, with bundles whose exact returns are known."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from omcda_deploy.bundle import Bundle, read_bundle
from omcda_deploy.cli import app
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.fingerprints import TrainingEpisodes, fingerprints
from omcda_deploy.datasets.writer import write_dataset
from omcda_deploy.envs import tabular
from omcda_deploy.errors import BundleError, ConfigError, DatasetError, EndpointError
from omcda_deploy.estimation import Bounds, Comparison, Estimator, TeamDistributions
from omcda_deploy.experiments.estimate import estimate
from omcda_deploy.experiments.promote import Demand, RefusedError, promote, refusal
from omcda_deploy.experiments.promotions import record
from omcda_deploy.local import LocalPolicy
from omcda_deploy.registry import team_spec
from tests.support.bundles import write_test_bundle
from tests.support.server_process import free_port, server_process

TASK = "toy/chain"
GAME, SPEC = tabular.game(TASK), team_spec(TASK)
SEEDS = {"1": 1, "2": 2, "3": 9, "4": 7, "5": 8}  # 2 earns more than 1, 3 and 5 less, 4 is far from it
SMALL = Comparison(Bounds(5, 4, 6), Bounds(0.5, -0.1, 1.1), 0.36, 400, 390.0, 1.0, 0.0, 0.01, 0.1, 0.95)


def tables(bundle: Bundle) -> list[NDArray[np.float64]]:
    policies = []
    for agent in bundle.spec.agents:
        states = np.eye(agent.observation_size, dtype=np.float32)
        logits = LocalPolicy(bundle, agent.name).act(states).parameters["logits"]
        weights = np.exp(logits.astype(np.float64))
        policies.append(weights / weights.sum(-1, keepdims=True))
    return policies


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    for version, seed in SEEDS.items():
        write_test_bundle(folder / version, SPEC, seed=seed)
    (folder / "current").write_text("1\n\n")
    return folder


@pytest.fixture(scope="module")
def dataset(releases: Path) -> Dataset:
    """Episodes of version 1."""
    bundle = write_test_bundle(releases.parent / "one", SPEC, seed=SEEDS["1"])
    return record(GAME, TASK, tables(bundle), 800, np.random.default_rng(0))


@pytest.fixture(scope="module")
def server(releases: Path) -> Iterator[tuple[str, str]]:
    """The endpoints of steps and of operators of a server, which begins with version 1."""
    port = free_port()
    options = ("--admin-port", str(port), "--log-json")
    with server_process(releases, "team", options=options, log=releases / "log") as process:
        yield process.endpoint, f"127.0.0.1:{port}"


@pytest.fixture
def admin(server: tuple[str, str]) -> Iterator[TeamAdmin]:
    with TeamAdmin([server[1]]) as admin:
        admin.switch("1")
        yield admin


def switches(releases: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (releases / "log").read_text().splitlines()]
    return [line for line in lines if line.get("call") == "Switch"]


def test_a_better_version_acts_and_the_evidence_stays(
    admin: TeamAdmin, releases: Path, dataset: Dataset
) -> None:
    evidence, statuses = promote(admin, "2", dataset, releases, Demand(at_least=1.0))
    truth = [tabular.exact_return(GAME, tables(read_bundle(releases / version))) for version in "21"]
    gain = evidence["improvement"]
    assert 1.0 < gain["low"] < truth[0] - truth[1] < gain["high"]
    digests = {version: read_bundle(releases / version).digest for version in "12"}
    assert (evidence["dataset"], evidence["version"], evidence["over"]) == (dataset.digest, "2", "1")
    assert (evidence["bundle"], evidence["over_bundle"]) == (digests["2"], digests["1"])
    (status,) = statuses.values()
    assert (status.current, json.loads(status.evidence)) == ("2", evidence)
    assert json.loads((releases / "current").read_text().splitlines()[2]) == evidence
    assert switches(releases)[-1]["evidence"] == evidence
    admin.switch("3")
    assert switches(releases)[-1]["replaced_evidence"] == evidence
    assert {status.evidence for status in admin.status().values()} == {""}


@pytest.mark.parametrize(
    ("version", "demand", "message"),
    [
        ("3", Demand(), "earns at most -2.[0-9]* more with 95 % confidence, expected over 0: keep"),
        (
            "4",
            Demand(),
            "the data cannot tell: 3.8 of 800 episodes speak for the team.*record about [0-9]{4} episodes",
        ),
        ("5", Demand(), r"expected over 0 \(the estimate is -0.5[0-9]*\): record more only if you believe"),
        ("2", Demand(at_least=4.0), "expected over 4 .* episodes would tell, these are 800"),
        ("2", Demand(temperature=0.2), "the data cannot tell"),
    ],
)
def test_evidence_that_carries_nothing_changes_nothing(
    admin: TeamAdmin, releases: Path, dataset: Dataset, version: str, demand: Demand, message: str
) -> None:
    before = len(switches(releases))
    with pytest.raises(RefusedError, match=message):
        promote(admin, version, dataset, releases, demand)
    (status,) = admin.status().values()
    assert (status.current, status.shadow, len(switches(releases))) == ("1", "", before)


def test_wrong_inputs_are_refused(admin: TeamAdmin, releases: Path, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="version 1 is current already"):
        promote(admin, "1", dataset, releases)
    with pytest.raises(ConfigError, match="a deterministic policy has no density"):
        promote(admin, "2", dataset, releases, Demand(temperature=0.0))
    with pytest.raises(DatasetError, match="serve --record"):
        promote(admin, "2", dataclasses.replace(dataset, behavior=None), releases)
    with pytest.raises(BundleError, match="is not a bundle"):
        promote(admin, "7", dataset, releases)
    for version in "12":
        write_test_bundle(tmp_path / version, SPEC, seed=3)
    with pytest.raises(BundleError, match=r"holds as version 1.*--releases"):
        promote(admin, "2", dataset, tmp_path)
    with pytest.raises(ConfigError, match="--at-least"):
        Demand(at_least=float("nan"))
    with pytest.raises(ConfigError, match="--shadow-first"):
        Demand(shadow_s=-1.0)


def sample(prints: NDArray[np.uint64]) -> str:
    return TrainingEpisodes(np.unique(prints), 2**64 - 1).to_text()


def test_the_episodes_that_trained_a_version_do_not_speak_for_it(
    admin: TeamAdmin, releases: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever file they are: here a third of those that judge."""
    trained: dict[str, Any] = {"dataset_digest": dataset.digest}
    monkeypatch.setattr("omcda_deploy.estimation.distributions.training_of", lambda bundle: trained)
    with pytest.raises(RefusedError, match=r"trained on 100.0 % of these episodes"):
        promote(admin, "2", dataset, releases)
    # Taken by hand: some of this game's episodes are alike, of which TrainingEpisodes.of keeps none.
    prints = fingerprints(dataset)
    trained = {"dataset_digest": "another", "episodes": sample(prints[::3])}
    with pytest.raises(RefusedError, match=r"trained on 3[3-6].[0-9] % of these episodes"):
        promote(admin, "2", dataset, releases)
    (share,) = estimate(dataset, [releases / "2"]).trained.values()
    assert share == pytest.approx(0.35, abs=0.02)
    trained["episodes"] = sample(prints[::40])
    evidence, _ = promote(admin, "2", dataset, releases)  # 2.5 % flatter nobody
    assert evidence["version"] == "2"
    assert 0.0 < evidence["trained_share"] < 0.05
    admin.switch("1")
    trained["episodes"] = TrainingEpisodes.of(dataset).to_text()  # of none, as they repeat each other
    assert promote(admin, "2", dataset, releases)[0]["trained_share"] is None
    admin.switch("1")
    trained["episodes"] = "?"
    with pytest.raises(BundleError, match="export the run again"):
        promote(admin, "2", dataset, releases)


def test_a_shadow_must_have_answered(
    server: tuple[str, str], admin: TeamAdmin, releases: Path, dataset: Dataset
) -> None:
    with pytest.raises(RefusedError, match="it answered 0 and failed at 0: let clients ask all servers"):
        promote(admin, "2", dataset, releases, Demand(shadow_s=0.1))
    (status,) = admin.status().values()
    assert (status.current, status.shadow) == ("1", "")
    done = threading.Event()

    def ask() -> None:
        observations = {agent.name: np.eye(4, dtype=np.float32)[0] for agent in SPEC.agents}
        with RemoteTeam([server[0]], spec=SPEC) as team:
            while not done.is_set():
                team.act(observations)
                time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        evidence, _ = promote(admin, "2", dataset, releases, Demand(shadow_s=1.0))
    finally:
        done.set()
        thread.join()
    assert evidence["shadow"]["answers"] > 5
    assert 0.0 <= evidence["shadow"]["difference"] <= 1.0


def test_a_version_that_changed_meanwhile_is_not_replaced(
    server: tuple[str, str],
    admin: TeamAdmin,
    releases: Path,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = admin.load

    def loaded_as_another_switches(version: str, **options: Any) -> object:
        with TeamAdmin([server[1]]) as other:
            other.switch("5")
        return load(version, **options)

    monkeypatch.setattr(admin, "load", loaded_as_another_switches)
    with pytest.raises(EndpointError, match="expected version 1 to be current, version 5 is"):
        promote(admin, "2", dataset, releases)
    (status,) = admin.status().values()
    assert (status.current, status.evidence) == ("5", "")


def test_the_commands(
    server: tuple[str, str], admin: TeamAdmin, releases: Path, dataset: Dataset, tmp_path: Path
) -> None:
    episodes = [dataset.episode(number) for number in range(400)]
    write_dataset(tmp_path / "data.hdf5", SPEC, episodes)
    options = ["--admin", server[1], "--estimate", str(tmp_path / "data.hdf5"), "--releases", str(releases)]

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["release", *words])

    promoted = run("promote", "2", *options)
    assert "version 2 answers: estimated to earn" in promoted.output
    assert "more than version 1, at least" in promoted.output
    refused = run("promote", "3", *options)
    assert isinstance(refused.exception, RefusedError)
    back = run("rollback", "--admin", server[1])
    assert "version 2 had been promoted: estimated to earn" in back.output


def test_a_version_is_evaluated_beside_the_current_one(
    server: tuple[str, str], admin: TeamAdmin, releases: Path, tmp_path: Path
) -> None:
    admin.load("2")

    def evaluate(*options: str) -> Result:
        words = ["evaluate", TASK, "--episodes", "2", "--wait", "5", *options]
        return CliRunner().invoke(app, words)

    file = tmp_path / "evaluation.json"
    done = evaluate("--endpoints", server[0], "--version", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text())["team"]["version"] == "2"
    assert {status.current for status in admin.status().values()} == {"1"}
    unknown = evaluate("--endpoints", server[0], "--version", "77")
    assert "unknown version '77'" in str(unknown.exception)
    local = evaluate("--bundle", str(releases / "2"), "--version", "2")
    assert "--version 2: expected --endpoints" in str(local.exception)


def test_a_bundles_clone_stands_for_what_acted_where_that_is_not_on_record(
    releases: Path, dataset: Dataset
) -> None:
    clone = read_bundle(releases / "1")
    with pytest.raises(ConfigError, match="behavior: expected none, as the dataset has the exact"):
        estimate(dataset, [releases / "2"], behavior=clone)
    unknown = dataclasses.replace(dataset, behavior=None)
    found = estimate(unknown, [releases / "2"], behavior=releases / "1")
    team = TeamDistributions.of_bundle(read_bundle(releases / "2"), unknown)
    expected = Estimator(unknown, TeamDistributions.of_clone(clone, unknown)).compare(team)
    assert not found.exact
    assert found.bundles[str(releases / "2")] == expected


def test_a_demand_that_is_missed_says_how_much_is_missing() -> None:
    assert "about 3300 episodes would tell, these are 400" in refusal(
        dataclasses.replace(SMALL, improvement=Bounds(0.5, -0.1, 1.1), standard_error=0.57), 0.0
    )
    assert refusal(dataclasses.replace(SMALL, improvement=Bounds(0.5, 0.1, 0.9)), 0.0) == ""
    assert "0.1 more" in refusal(dataclasses.replace(SMALL, improvement=Bounds(0.5, 0.1, 0.9)), 0.1)
    assert "weights have a mean of 0.4" in refusal(dataclasses.replace(SMALL, mean_weight=0.4), -9.0)
    assert "in 6 % of the recorded states" in refusal(dataclasses.replace(SMALL, unsupported=0.06), -9.0)
