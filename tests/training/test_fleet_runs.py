"""Run folders of fleets: a run leaves in company what it leaves alone, through kills and failures of others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from omcda_deploy import registry
from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError
from omcda_deploy.training import loop, member
from omcda_deploy.training.algorithms import omcda
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.checkpoint import load_state
from omcda_deploy.training.metrics import DivergedError
from omcda_deploy.training.observer import TrainObserver
from omcda_deploy.training.request import TrainRequest
from omcda_deploy.training.run_folder import read_config, snapshot_steps, training_seconds
from tests.support.synthetic import differing, write_dataset

STEPS, EVERY, LOG = 60, 20, 5
SMALL = {"hidden": 8, "batch_size": 8}
SETTINGS = {**SMALL, "mixer_hidden": 4, "reallocate_every": 5, "tau": 0.2, "tau_policy": 0.2}
CLONING = {"steps": 20, "batch_size": 16, "check_every": 10}
RUNS: Mapping[str, tuple[int, Mapping[str, Any]]] = {  # name: seed, settings of its own
    "a": (0, {"d_tot": 0.01}),
    "b": (1, {"d_tot": 0.02, "allocation": "optimal"}),
    "c": (2, {"d_tot": 0.01, "allocation": "random", "share_temperature": 0.5}),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hopper's shapes, random numbers: 8 episodes of 240 transitions in all."""
    path = tmp_path_factory.mktemp("data") / "hopper.hdf5"
    return write_dataset(path, registry.team_spec("mamujoco/hopper-3x1"), [40, 20] * 4)


@pytest.fixture(scope="module")
def dataset(file: Path) -> Dataset:
    return read(file)


def request(name: str, algorithm: str = "omcda", **changes: Any) -> TrainRequest:
    seed, own = RUNS[name]
    fields: dict[str, Any] = {
        "steps": STEPS,
        "seed": seed,
        "settings": {**SETTINGS, **own},
        "behavior": CLONING,
        "log_every": LOG,
        "checkpoint_every": EVERY,
        "snapshot_every": EVERY,
        **changes,
    }
    return TrainRequest(algorithm, **fields)


def train_fleet(dataset: Dataset, out: Path, names: Sequence[str] = tuple(RUNS), **options: Any) -> None:
    requests = [(request(name), out / name) for name in names]
    loop.train_fleet(dataset, requests, dataset_path="data.hdf5", **options)


@pytest.fixture(scope="module")
def alone(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of uninterrupted runs, each trained by itself."""
    out = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        loop.train_fleet(dataset, [(request(name), out / name)], dataset_path="data.hdf5")
    return out


def without_commit(path: Path) -> str:
    """The text of a file; that of config.json names the commit, and whether it was changed since."""
    return "".join(line for line in path.read_text().splitlines(True) if not line.startswith('  "git"'))


def require_equal_folders(ours: Path, theirs: Path) -> None:
    """Every file but times and TensorBoard's, which hold times, is equal; tensors to the last bit."""

    def files(run: Path) -> set[str]:
        names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        # A kill during a write leaves a hidden file beside the one that it was to replace.
        return {name for name in names if not name.startswith((".resume.pt.", "tensorboard"))}

    assert files(ours) == files(theirs)
    assert (ours / "tensorboard").is_dir()
    for name in sorted(files(ours) - {"timing.json"}):
        if name.endswith(".pt"):
            assert differing(load_state(ours / name), load_state(theirs / name)) == set(), (ours, name)
        else:
            assert without_commit(ours / name) == without_commit(theirs / name), (ours, name)


def last_step(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


# -- folders --------------------------------------------------------------------------------------------------


def test_a_fleet_leaves_the_folders_of_single_runs(dataset: Dataset, alone: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, Mapping[str, float]]] = []

    class Watcher(TrainObserver):
        def logged(self, step: int, metrics: Mapping[str, float]) -> None:
            seen.append((step, metrics))

    train_fleet(dataset, tmp_path, observer=Watcher())
    for name in RUNS:
        require_equal_folders(tmp_path / name, alone / name)
        assert snapshot_steps(tmp_path / name) == [20, 40, 60]
        assert training_seconds(tmp_path / name) > 0
    assert differing(load_state(tmp_path / "a" / "resume.pt"), load_state(tmp_path / "b" / "resume.pt"))
    # A watcher sees the mean of the runs.
    assert [step for step, _ in seen] == list(range(LOG, STEPS + 1, LOG))
    lines = [json.loads((alone / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in RUNS]
    for key, value in seen[-1][1].items():
        assert value == pytest.approx(sum(line[key] for line in lines) / 3)


@pytest.mark.parametrize(
    "algorithm",
    [n for n in registry.algorithms() if "continuous" in registry.load_algorithm(n).ACTIONS],
)
def test_a_fleet_of_any_algorithm_leaves_the_folders_of_single_runs(
    dataset: Dataset, tmp_path: Path, algorithm: str
) -> None:
    module = registry.load_algorithm(algorithm)
    swept = [n for n in getattr(module, "PER_RUN", ()) if isinstance(getattr(module.Config(), n), float)]
    runs = []
    for name, factor in (("a", 1.0), ("b", 0.5)):
        own = {setting: factor * getattr(module.Config(), setting) for setting in swept}
        runs.append((request(name, algorithm, steps=EVERY, settings={**SMALL, **own}), name))
    loop.train_fleet(dataset, [(each, tmp_path / "fleet" / name) for each, name in runs])
    for each, name in runs:
        loop.train_fleet(dataset, [(each, tmp_path / name)])
        require_equal_folders(tmp_path / "fleet" / name, tmp_path / name)


def test_each_run_is_evaluated_as_it_asked(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {}

    class Evaluations:
        def __init__(self, run: Path, every: int, reward: str | None) -> None:
            asked[run.name] = every

        def catch_up(self, step: int) -> None:
            assert step == 0

        def start(self, step: int) -> None:
            pass

        def wait(self) -> None:
            pass

    monkeypatch.setattr(member, "Evaluator", Evaluations)
    requests = [request("a"), request("b", evaluate_every=20), request("c", evaluate_every=40)]
    loop.train_fleet(dataset, [(each, tmp_path / name) for each, name in zip(requests, RUNS, strict=True)])
    assert asked == {"b": 20, "c": 40}


def test_finished_runs_are_left_alone_by_those_that_go_on(
    dataset: Dataset, alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(alone / "a", tmp_path / "a")
    stopped_at(dataset, tmp_path / "b", "b", 45)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    loop.resume_fleet(dataset, [tmp_path / "a", tmp_path / "b"])
    assert {path: path.read_bytes() for path in before} == before
    require_equal_folders(tmp_path / "b", alone / "b")


class StoppedError(Exception):
    pass


class Stopper(TrainObserver):
    def __init__(self, step: int) -> None:
        self._step = step

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._step:
            raise StoppedError


def stopped_at(dataset: Dataset, out: Path, name: str, step: int) -> None:
    """A run that was stopped after it logged ``step``."""
    with pytest.raises(StoppedError):
        loop.train_fleet(dataset, [(request(name), out)], dataset_path="data.hdf5", observer=Stopper(step))


def test_runs_that_never_met_are_resumed_side_by_side(dataset: Dataset, alone: Path, tmp_path: Path) -> None:
    """Two stand at step 20, one at none."""
    for name, step in (("a", 25), ("b", 35), ("c", 10)):
        stopped_at(dataset, tmp_path / name, name, step)
    assert [(tmp_path / name / "resume.pt").exists() for name in RUNS] == [True, True, False]
    loop.resume_fleet(dataset, [tmp_path / name for name in ("c", "b", "a")])
    for name in RUNS:
        require_equal_folders(tmp_path / name, alone / name)


# -- killed ---------------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from pathlib import Path
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.training.observer import TrainObserver
from tests.training.test_fleet_runs import train_fleet

file, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def stop():
    print("now", flush=True)
    time.sleep(60)

class Stopper(TrainObserver):
    def logged(self, step, metrics):
        if moment == "between checkpoints" and step == 35:
            stop()

writes = 0

def fsync(handle):
    global writes
    writes += any((out / "b").glob(".resume.pt.*"))
    if writes == 2:  # of step 40; the first was of step 20
        stop()

if moment == "between members":
    os.fsync = fsync
train_fleet(read(file), out, observer=Stopper())
"""


def kill(file: Path, out: Path, moment: str) -> Path:
    """Train the fleet in a process of its own, and SIGKILL it at the given moment."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(out), moment],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    return out


@pytest.fixture(scope="module")
def killed(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet killed at step 35 of 60."""
    out = kill(file, tmp_path_factory.mktemp("killed"), "between checkpoints")
    assert [load_state(out / name / "resume.pt")["step"] for name in RUNS] == [20, 20, 20]
    assert [last_step(out / name) for name in RUNS] == [35, 35, 35]
    return out


@pytest.mark.parametrize("parts", [["abc"], ["ca", "b"], ["b", "c", "a"]])
def test_a_killed_fleet_goes_on_whole_or_in_parts(
    dataset: Dataset, killed: Path, alone: Path, tmp_path: Path, parts: list[str]
) -> None:
    out = tmp_path / "fleet"
    shutil.copytree(killed, out)
    for part in parts:
        loop.resume_fleet(dataset, [out / name for name in part])
    for name in RUNS:
        require_equal_folders(out / name, alone / name)


@pytest.mark.parametrize("parts", [["abc"], ["cb", "a"]])
def test_a_fleet_killed_while_it_saves_goes_on_from_different_steps(
    file: Path, dataset: Dataset, alone: Path, tmp_path: Path, parts: list[str]
) -> None:
    out = kill(file, tmp_path / "fleet", "between members")
    assert [load_state(out / name / "resume.pt")["step"] for name in RUNS] == [40, 20, 20]
    for part in parts:
        loop.resume_fleet(dataset, [out / name for name in part])
    for name in RUNS:
        require_equal_folders(out / name, alone / name)


# -- diverged -------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, step: int, *runs: int) -> None:
    """Make the actors of ``runs`` not a number before a step of OMCDA."""
    healthy = omcda.Algorithm.update

    def update(self: omcda.Algorithm, batch: Batch, watched: bool = True) -> dict[str, torch.Tensor]:
        if self.step == step:
            with torch.no_grad():
                for run in runs:
                    next(self.actor.parameters())[run] = torch.nan
        return healthy(self, batch, watched)

    monkeypatch.setattr(omcda.Algorithm, "update", update)


def test_a_run_that_diverges_ends_alone(
    dataset: Dataset, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 22, 1)
        message = rf"^1 of 3 runs failed: {tmp_path / 'b'}: training diverged before step 25: .* is nan"
        with pytest.raises(DivergedError, match=message) as raised:
            train_fleet(dataset, tmp_path)
    assert str(tmp_path / "a") not in str(raised.value)
    for name in ("a", "c"):
        require_equal_folders(tmp_path / name, alone / name)
    # It keeps what it was before, from which it may go on.
    assert last_step(tmp_path / "b") == load_state(tmp_path / "b" / "resume.pt")["step"] == 20
    assert snapshot_steps(tmp_path / "b") == [20]
    loop.resume_fleet(dataset, [tmp_path / "b"])
    require_equal_folders(tmp_path / "b", alone / "b")


def test_a_fleet_whose_runs_all_diverge_stops(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 3, 0, 2)
    poison(monkeypatch, 12, 1)
    steps: list[int] = []

    class Watcher(TrainObserver):
        def logged(self, step: int, metrics: Mapping[str, float]) -> None:
            steps.append(step)

    with pytest.raises(DivergedError, match=r"^3 of 3 runs failed: ") as raised:
        train_fleet(dataset, tmp_path, observer=Watcher())
    assert all(str(tmp_path / name) in str(raised.value) for name in RUNS)
    assert steps == [5, 10]  # of the run that lived longer
    assert [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in RUNS] == [0, 2, 0]


# -- refused --------------------------------------------------------------------------------------------------

UNEQUAL: list[dict[str, Any]] = [
    {"settings": {**SETTINGS, "hidden": 16}},
    {"settings": {**SETTINGS, "batch_size": 16}},
    {"settings": {**SETTINGS, "lr": 1e-3}},
    {"settings": {**SETTINGS, "decoupled": False}},
    {"algorithm": "bc", "settings": SMALL},
    {"steps": 40},
    {"log_every": 10},
    {"time_limit_is_terminal": True},
]


@pytest.mark.parametrize("changes", UNEQUAL, ids=str)
def test_runs_of_unequal_shapes_are_refused(
    dataset: Dataset, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runs = [(request("a"), tmp_path / "a"), (request("b", **changes), tmp_path / "b")]
    with pytest.raises(
        ConfigError, match=rf"{tmp_path / 'b'} and {tmp_path / 'a'} cannot be trained side by side"
    ):
        loop.train_fleet(dataset, runs)
    assert list(tmp_path.iterdir()) == []


def test_unequal_runs_are_refused_on_resuming(dataset: Dataset, alone: Path, tmp_path: Path) -> None:
    loop.train_fleet(dataset, [(request("a", "bc", steps=EVERY, settings=SMALL), tmp_path / "bc")])
    with pytest.raises(
        ConfigError, match=rf"{tmp_path / 'bc'} and {alone / 'a'} cannot be trained side by side"
    ):
        loop.resume_fleet(dataset, [alone / "a", tmp_path / "bc"])


def test_an_existing_folder_refuses_the_whole_fleet(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match=rf"{tmp_path / 'b'} exists already"):
        train_fleet(dataset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert list((tmp_path / "b").iterdir()) == []


def test_seeds_and_settings_per_run_are_each_runs_own(alone: Path) -> None:
    for name, (seed, own) in RUNS.items():
        config = read_config(alone / name)
        assert config.seed == seed
        assert {key: config.settings[key] for key in own} == own
    assert len({loop.fleet_key(read_config(alone / name)) for name in RUNS}) == 1
