"""Training as a function: paths and datasets, refusals before a dataset is read, export, and a run that goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, OmcdaError, UnknownNameError
from omcda_deploy.experiments import train as training
from omcda_deploy.experiments.export import export
from omcda_deploy.registry import team_spec
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.checkpoint import load_state
from omcda_deploy.training.observer import TrainObserver
from omcda_deploy.training.request import TrainRequest
from omcda_deploy.training.run_folder import read_config, snapshot_steps
from tests.support.synthetic import continuous_spec, differing, write_dataset

TASK = "mamujoco/hopper-3x1"
SMALL: dict[str, Any] = {
    "steps": 10,
    "settings": {"hidden": 8, "batch_size": 8},
    "behavior": {"steps": 10, "check_every": 10},
    "log_every": 5,
    "checkpoint_every": 5,
    "snapshot_every": 5,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(folder / "cache"))
        yield write_dataset(folder / "hopper.hdf5", team_spec(TASK), [40, 20] * 2)


def test_a_path_and_a_dataset_give_the_same_run(file: Path, tmp_path: Path) -> None:
    by_path = training.train(str(file), "bc", str(tmp_path / "path"), **SMALL)
    by_dataset = training.train(read(file), "bc", tmp_path / "dataset", **SMALL)
    assert by_path == tmp_path / "path"
    assert snapshot_steps(by_path) == [5, 10]
    assert read_config(by_path).dataset == str(file)
    assert read_config(by_dataset).dataset == ""
    assert differing(load_state(by_path / "resume.pt"), load_state(by_dataset / "resume.pt")) == set()

    bundle = export(str(by_path), str(tmp_path / "bundle"))
    assert bundle.manifest["training"]["step"] == 10
    assert export(by_path, tmp_path / "earlier", step=5).manifest["training"]["step"] == 5


def test_an_interrupted_run_goes_on(file: Path, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    class Stopper(TrainObserver):
        def logged(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 10:
                raise StoppedError

    whole = training.train(file, "bc", tmp_path / "whole", **SMALL)
    for name, dataset in (("file", file), ("memory", read(file))):
        with pytest.raises(StoppedError):
            training.train(dataset, "bc", tmp_path / name, observer=Stopper(), **SMALL)
        assert load_state(tmp_path / name / "resume.pt")["step"] == 5
    with pytest.raises(ConfigError, match="memory did not begin with a dataset file: expected its dataset"):
        training.resume(tmp_path / "memory")
    for run in (training.resume(str(tmp_path / "file")), training.resume(tmp_path / "memory", read(file))):
        assert differing(load_state(whole / "resume.pt"), load_state(run / "resume.pt")) == set()
    with pytest.raises(ConfigError, match=r"evaluate_every: expected a multiple of 5, .* got 3"):
        training.resume(whole, evaluate_every=3)


def test_an_observer_learns_what_begins(file: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, tuple[str, ...], int, Mapping[str, Any]]] = []

    class Witness(TrainObserver):
        def started(self, spec: TeamSpec, algorithm: str, steps: int, recipe: Mapping[str, Any]) -> None:
            calls.append((algorithm, spec.names, steps, recipe))

    run = training.train(file, "bc", tmp_path / "run", observer=Witness(), **SMALL)
    training.resume(run, observer=Witness())
    assert calls == [("bc", team_spec(TASK).names, 10, {})] * 2


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"algorithm": "omcdaa"}, UnknownNameError, "did you mean 'omcda'"),
        ({"settings": {"learning_rate": 1.0}}, UnknownNameError, "unknown setting of bc 'learning_rate'"),
        ({"settings": {"lr": 2.0}}, ConfigError, r"bc\.lr: expected 0 to 1, got 2\.0"),
        ({"steps": 0}, ConfigError, "steps: expected at least 1, got 0"),
        ({"device": "tpu"}, ConfigError, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"out": "taken"}, ConfigError, "taken exists already"),
    ],
)
def test_requests_are_refused_before_the_dataset_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[OmcdaError],
    message: str,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the dataset was read")

    monkeypatch.setattr(training, "read_dataset", never)
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    arguments: dict[str, Any] = {"algorithm": "bc", "out": "new", **SMALL, **changes}
    with pytest.raises(kind, match=message):
        training.train("data.hdf5", arguments.pop("algorithm"), arguments.pop("out"), **arguments)
    assert not Path("new").exists()


def test_settings_that_fit_only_with_the_recipe_are_judged_with_it() -> None:
    """Before a task is known nobody can say that 30 elites of OMAR's 20 actions do not fit."""
    request = TrainRequest("omar", 10, settings={"elites": 30})
    request.check()
    with pytest.raises(ConfigError, match=r"omar\.elites: expected 2 to 20, got 30"):
        request.resolved(continuous_spec())


def test_importing_it_needs_no_torch() -> None:
    code = (
        "import sys; from omcda_deploy.experiments import export, train, toy_games, sweep; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("steps", "log_every", "kept"),
    [(20_000, 100, 1000), (5000, 100, 200), (500, 100, 100), (20, 100, 100), (100, 1, 5), (19, 1, 1)],
)
def test_a_twentieth_of_the_steps_lies_between_policies(steps: int, log_every: int, kept: int) -> None:
    """Rounded to steps that are logged, and never none; what a request states comes first."""
    request = TrainRequest("bc", steps, log_every=log_every)
    assert request.kept_every == kept
    request.check()
    assert replace(request, evaluate_every=400).kept_every == 400
    assert replace(request, evaluate_every=400, snapshot_every=200).kept_every == 200
