"""Training runs: kills, refusals, and the contents of run folders."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, ContractError, OmcdaError, UnknownNameError
from omcda_deploy.files import cache_folder
from omcda_deploy.policy import NoiseSource
from omcda_deploy.registry import team_spec
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training import behavior_model as behavior_model_file
from omcda_deploy.training import evaluation, loop
from omcda_deploy.training.batches import Batch, TransitionSampler
from omcda_deploy.training.behavior_model import BehaviorConfig, behavior_model
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.distributions import Categorical, TanhGaussian, policy_of
from omcda_deploy.training.evaluation import EVALUATIONS, Evaluator
from omcda_deploy.training.metrics import DivergedError, MetricsWriter, Window
from omcda_deploy.training.observer import TrainObserver
from omcda_deploy.training.request import TrainRequest
from omcda_deploy.training.run_folder import read_config, read_snapshot, snapshot_steps, training_seconds
from omcda_deploy.training.settings import build
from omcda_deploy.training.snapshot_team import SnapshotTeam
from tests.support.synthetic import (
    behavior_actor,
    continuous_spec,
    differing,
    discrete_spec,
    stacked,
    write_dataset,
)

STEPS, EVERY = 60, 20
SETTINGS = {
    "hidden": 8,
    "mixer_hidden": 4,
    "batch_size": 8,
    "reallocate_every": 5,
    "d_tot": 0.01,
    "tau": 0.2,
    "tau_policy": 0.2,
}
CLONING = {"steps": 20, "batch_size": 16, "check_every": 10}
BEHAVIOR = build(BehaviorConfig, {**CLONING, "hidden": 8})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the file, never the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hopper's shapes, random numbers: 8 episodes of 240 transitions in all."""
    path = tmp_path_factory.mktemp("data") / "hopper.hdf5"
    return write_dataset(path, team_spec("mamujoco/hopper-3x1"), [40, 20] * 4)


@pytest.fixture(scope="module")
def dataset(file: Path) -> Dataset:
    return read(file)


def train(
    dataset: Dataset,
    out: Path,
    algorithm: str = "omcda",
    observer: TrainObserver | None = None,
    **changes: Any,
) -> Path:
    settings = {k: v for k, v in SETTINGS.items() if algorithm == "omcda" or k in ("hidden", "batch_size")}
    fields: dict[str, Any] = {
        "steps": STEPS,
        "settings": settings,
        "behavior": CLONING,
        "log_every": 5,
        "checkpoint_every": EVERY,
        "snapshot_every": EVERY,
        **changes,
    }
    runs = [(TrainRequest(algorithm, **fields), out)]
    loop.train_fleet(dataset, runs, dataset_path="data.hdf5", observer=observer)
    return out


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return train(dataset, tmp_path_factory.mktemp("runs") / "run")


# -- killed and resumed ---------------------------------------------------------------------------------------


def train_until(file: Path, out: Path, moment: str, reached: Connection) -> None:
    """Train or resume until ``moment``, say so, and wait there. Runs in a process of its own."""

    def stop() -> None:
        reached.send(moment)
        time.sleep(60)

    class Stopper(TrainObserver):
        def logged(self, step: int, metrics: Mapping[str, float]) -> None:
            if moment == "between checkpoints" and step == 35:
                stop()

    if moment == "while saving":  # step 60's checkpoint is written, but not yet in its place
        os.fsync = lambda fd: stop() if any(out.glob(".resume.pt.*")) else None
    if out.exists():
        loop.resume_fleet(read(file), [out], observer=Stopper())
    else:
        train(read(file), out, observer=Stopper())


def kill(forking: ForkServerContext, file: Path, out: Path, moment: str) -> None:
    """Train or resume in a process of its own, and SIGKILL it at the given moment."""
    reached, sender = forking.Pipe(duplex=False)
    process = forking.Process(target=train_until, args=(file, out, moment, sender))
    process.start()
    sender.close()
    assert reached.recv() == moment  # EOFError when the process ends first
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_run_resumes_as_if_it_had_never_stopped(
    forking: ForkServerContext, file: Path, dataset: Dataset, run: Path, tmp_path: Path
) -> None:
    """SIGKILL at step 35 of 60, again while a checkpoint is being written, then to the end: every bit is equal."""
    out = tmp_path / "killed"
    kill(forking, file, out, "between checkpoints")
    assert load_state(out / "resume.pt")["step"] == 20
    assert last_step(out) == 35  # seven lines were written, three of which are beyond the checkpoint
    kill(forking, file, out, "while saving")
    assert load_state(out / "resume.pt")["step"] == 20
    assert last_step(out) == 40
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 45, "loss/pol')  # a kill during a write leaves such a line
    spent = training_seconds(out)
    loop.resume_fleet(dataset, [out])
    assert training_seconds(out) > spent > 0  # seconds of the 20 steps that count, then of all

    assert differing(load_state(run / "resume.pt"), load_state(out / "resume.pt")) == set()
    assert snapshot_steps(out) == snapshot_steps(run) == [20, 40, 60]
    for step in snapshot_steps(run):
        name = f"policies/step-{step:08d}.pt"
        assert differing(load_state(run / name), load_state(out / name)) == set()
    assert (out / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert (out / "config.json").read_text() == (run / "config.json").read_text()


def last_step(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    dataset: Dataset, run: Path, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    class Killer(TrainObserver):
        def logged(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 15:
                raise KilledError

    with pytest.raises(KilledError):
        train(dataset, tmp_path / "run", observer=Killer())
    assert not (tmp_path / "run" / "resume.pt").exists()
    loop.resume_fleet(dataset, [tmp_path / "run"])
    assert differing(load_state(run / "resume.pt"), load_state(tmp_path / "run" / "resume.pt")) == set()


def test_resuming_a_finished_run_changes_nothing(dataset: Dataset, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.*") if "tensorboard" not in str(path)}
    loop.resume_fleet(dataset, [run])
    assert {path: path.read_bytes() for path in before} == before


def test_the_seed_decides_the_run(dataset: Dataset, tmp_path: Path) -> None:
    first, again, other = (
        load_state(train(dataset, tmp_path / name, steps=10, seed=seed) / "resume.pt")
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert differing(first, again) == set()
    assert {f"actor/mlp.{layer}.weight" for layer in ("first", "second", "last")} <= differing(first, other)


# -- what a run holds -----------------------------------------------------------------------------------------


def test_every_checkpoint_is_tensors_and_plain_values(run: Path) -> None:
    files = sorted(run.rglob("*.pt"))
    assert [file.name for file in files] == [
        "behavior.pt",
        *(f"step-{step:08d}.pt" for step in (20, 40, 60)),
        "resume.pt",
    ]
    for file in files:
        torch.load(file, weights_only=True)


def test_metrics_are_lines_of_finite_json(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    for line in lines:
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in line.values())
        assert {
            f"{name}/agent_{i}" for name in ("kl", "budget", "alpha", "influence") for i in range(3)
        } <= set(line)
        assert {"loss/policy", "loss/reward_critic", "z/mean_exp", "alpha_at_bound/agent_0"} <= set(line)
    assert list((run / "tensorboard").iterdir())


def test_windows_hold_means_per_agent_and_of_what_was_measured() -> None:
    window = Window(("a", "b"))
    kl = torch.tensor([[1.0, 2.0], [0.0, 8.0]])  # [R, N]
    window.add({"x": torch.tensor([1.0, 0.5]), "kl": kl})
    window.add({"x": torch.tensor([4.0, 0.5]), "kl": 3.0 * kl, "rare": torch.tensor([7.0, 9.0])})
    assert window.close() == [
        {"x": 2.5, "kl/a": 2.0, "kl/b": 4.0, "rare": 7.0},
        {"x": 0.5, "kl/a": 0.0, "kl/b": 16.0, "rare": 9.0},
    ]
    assert window.close() == []


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in (5, 10, 15):
        writer.write(step, {"x": float(step)})
    writer.close()
    MetricsWriter(tmp_path, 10).close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [{"step": 5, "x": 5.0}, {"step": 10, "x": 10.0}]


def test_a_snapshot_is_the_policy_with_its_prices_and_budgets(dataset: Dataset, run: Path) -> None:
    state, snapshot = load_state(run / "resume.pt"), read_snapshot(run)
    assert snapshot.step == STEPS
    assert differing(state["policy"], snapshot.policy.state_dict()) == set()
    assert differing(load_state(run / "behavior.pt")["model"], snapshot.behavior.state_dict()) == set()
    shares = state["allocation"]["shares"]
    assert snapshot.budgets == dict(zip(dataset.spec.names, (0.01 * shares).tolist(), strict=True))
    prices = state["dual"]["log_alpha"].exp().tolist()
    assert snapshot.alphas == dict(zip(dataset.spec.names, prices, strict=True))
    assert snapshot.observations.shape == (1000, 3, 14)
    recorded = {row.tobytes() for row in dataset.observations}
    assert all(row.tobytes() in recorded for row in snapshot.observations)
    assert read_snapshot(run, 20).step == 20
    with pytest.raises(ConfigError, match="holds no policy of step 30: it has 20, 40, 60"):
        read_snapshot(run, 30)


def test_bc_has_neither_prices_nor_budgets(dataset: Dataset, tmp_path: Path) -> None:
    snapshot = read_snapshot(train(dataset, tmp_path / "bc", "bc", steps=20))
    assert snapshot.budgets is None
    assert snapshot.alphas is None


def test_files_of_a_run_can_be_read_by_others(run: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in run.rglob("*.pt"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


# -- what is refused ------------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_and_says_where(tmp_path: Path) -> None:
    path = write_dataset(
        tmp_path / "huge.hdf5", team_spec("mamujoco/hopper-3x1"), [30, 30], reward_scale=1e30
    )
    with pytest.raises(DivergedError, match=r"diverged before step 5: loss/reward_critic is (inf|nan)"):
        train(read(path), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_an_existing_folder_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match=r"mine exists already: choose another --out.* --resume"):
        train(dataset, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_another_dataset_is_refused_on_resuming(run: Path, tmp_path: Path) -> None:
    other = read(write_dataset(tmp_path / "o.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20], seed=9))
    with pytest.raises(ConfigError, match=r"was trained on a dataset of digest \w{12}…, got \w{12}…"):
        loop.resume_fleet(other, [run])


Refusal = tuple[dict[str, Any], type[OmcdaError], str]
REFUSALS: list[Refusal] = [
    ({"steps": 0}, ConfigError, "steps"),
    ({"seed": -1}, ConfigError, "seed: expected 0 to .*, got -1"),
    ({"threads": 0}, ConfigError, "threads: expected at least 1, got 0"),
    ({"checkpoint_every": 0}, ConfigError, "checkpoint_every"),
    ({"checkpoint_every": 7}, ConfigError, "checkpoint_every: expected a multiple of 5, .* got 7"),
    ({"snapshot_every": -5}, ConfigError, "snapshot_every"),
    ({"log_every": 0}, ConfigError, "log_every"),
    ({"device": "tpu"}, ConfigError, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ({"algorithm": "omcdaa"}, UnknownNameError, "did you mean 'omcda'"),
    (
        {"settings": {"d_tott": 1}},
        UnknownNameError,
        "unknown setting of omcda 'd_tott': did you mean 'd_tot'",
    ),
    ({"settings": {"d_tot": -1.0}}, ConfigError, r"omcda\.d_tot: expected .*, got -1"),
    ({"settings": {"hidden": 8.5}}, ConfigError, r"omcda\.hidden: expected int, got 8\.5"),
    ({"settings": {"hidden": True}}, ConfigError, r"omcda\.hidden: expected int, got True"),
    ({"settings": {"d_tot": True}}, ConfigError, r"omcda\.d_tot: expected float, got True"),
    ({"behavior": {"steps": True}}, ConfigError, r"BehaviorConfig\.steps: expected int, got True"),
    ({"steps": True}, ConfigError, "steps: expected int, got True"),
    ({"seed": True}, ConfigError, "seed: expected int, got True"),
    ({"threads": True}, ConfigError, "threads: expected int, got True"),
    ({"log_every": True}, ConfigError, "log_every: expected int, got True"),
    ({"evaluate_every": True}, ConfigError, "evaluate_every: expected int, got True"),
    ({"steps": 10.5}, ConfigError, r"steps: expected int, got 10\.5"),
    ({"settings": {"hidden": 8, "grad_clip": "inf"}}, ConfigError, r"omcda\.grad_clip: expected .*, got inf"),
    ({"behavior": {"hidden": 16}}, ConfigError, "expected behavior hidden 8"),
    ({"behavior": {"stepps": 1}}, UnknownNameError, "unknown setting of BehaviorConfig 'stepps'"),
    (
        {"settings": {"hidden": 8, "d_tot": "auto", "price": "gradient"}},
        ConfigError,
        r"the choice of d_tot tries 0\.6 nats: omcda\.d_eval: expected at least d_tot \(0\.6\) with price=gradient",
    ),
    ({"evaluate_every": 30}, ConfigError, "evaluate_every: expected a multiple of 20, .* got 30"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSALS)
def test_bad_arguments_are_refused_before_anything_is_written(
    dataset: Dataset, tmp_path: Path, changes: dict[str, Any], kind: type[OmcdaError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(dataset, tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sees no GPU\. Use --device cpu"):
        train(dataset, tmp_path / "run", device="cuda:0")
    assert list(tmp_path.iterdir()) == []


def test_an_algorithm_that_does_not_handle_the_actions_is_refused(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omcda_deploy.training.algorithms import bc

    monkeypatch.setattr(bc, "ACTIONS", frozenset({"discrete"}))
    with pytest.raises(ContractError, match=r"bc handles discrete actions, .* has continuous ones"):
        train(dataset, tmp_path / "run", "bc")


def test_a_folder_that_is_no_run_cannot_be_resumed(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.json"):
        loop.resume_fleet(dataset, [tmp_path])
    (tmp_path / "config.json").write_text('{"algorithm": "bc"')
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        loop.resume_fleet(dataset, [tmp_path])


def test_a_configuration_with_true_for_a_number_is_damaged(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "steps": True}))
    with pytest.raises(ConfigError, match=r"config\.json is damaged: steps: expected int, got True"):
        read_config(tmp_path)


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "resume.pt"
    cut.write_bytes((run / "resume.pt").read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"resume\.pt is damaged .*: restore it from a copy, or remove it"):
        load_state(cut)
    with pytest.raises(ConfigError, match=r"none\.pt does not exist"):
        load_state(tmp_path / "none.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ConfigError, match="is damaged"):
        load_state(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_saving_that_fails_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resume.pt"
    save_state(path, {"step": 1})

    def full(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_state(path, {"step": 2})
    assert load_state(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_folder_appears_whole(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is there a folder at --out that can neither be resumed nor started anew."""
    out = tmp_path / "run"
    seen: list[bool] = []

    def watch(path: Path, state: dict[str, Any]) -> None:
        save_state(path, state)
        seen.append(out.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", watch)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, out)
    assert seen == [False]
    assert list(tmp_path.iterdir()) == []


# -- behaviour model ------------------------------------------------------------------------------------------


def test_the_behavior_model_is_cloned_once_per_dataset(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []

    class Counter(TrainObserver):
        def cloning(self, step: int, steps: int, loss: float) -> None:
            calls.append(step)

    for name in ("omcda", "bc"):
        train(dataset, tmp_path / name, name, steps=5, observer=Counter())
        assert calls == [10, 20]  # calls of the first run
    [cached] = (tmp_path / "cache").rglob("*.pt")
    models = [load_state(path)["model"] for path in (cached, *sorted(tmp_path.glob("*/behavior.pt")))]
    assert len(models) == 3
    assert differing(models[0], models[1]) == differing(models[0], models[2]) == set()
    # Another dataset or another setting is another model.
    other = read(write_dataset(tmp_path / "o.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20], seed=9))
    behavior_model(other, BEHAVIOR)
    behavior_model(dataset, dataclasses.replace(BEHAVIOR, seed=1))
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 3


def test_a_runs_clone_has_its_seed(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of several seeds would else share one clone, and their spread leave out what a clone varies."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    settings = {"hidden": 8, "batch_size": 16}
    runs = [tmp_path / f"seed{seed}" for seed in (3, 5)]
    requests = [TrainRequest("bc", 5, seed, settings, CLONING) for seed in (3, 5)]
    seen: list[tuple[int, int]] = []

    class Counter(TrainObserver):
        def cloning(self, step: int, steps: int, loss: float) -> None:
            seen.append((step, steps))

    loop.train_fleet(dataset, list(zip(requests, runs, strict=True)), observer=Counter())
    assert seen == [(step, 40) for step in (10, 20, 30, 40)]  # both clones are one count
    train(dataset, tmp_path / "alone", "bc", steps=5, seed=5)
    train(dataset, tmp_path / "given", "bc", steps=5, seed=5, behavior={**CLONING, "seed": 3})
    [third, fifth, alone, given] = (
        load_state(run / "behavior.pt")["model"] for run in (*runs, tmp_path / "alone", tmp_path / "given")
    )
    assert differing(third, fifth)
    assert differing(fifth, alone) == differing(third, given) == set()
    assert [read_config(run).behavior["seed"] for run in runs] == [3, 5]


def test_runs_that_start_together_clone_once(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path))
    clone = behavior_model_file.fit
    clones: list[int] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        clones.append(1)
        time.sleep(0.2)  # long enough for the others to look into the empty cache, were they let in
        return clone(*args, **kwargs)

    monkeypatch.setattr(behavior_model_file, "fit", slow)
    with ThreadPoolExecutor(3) as pool:
        models = [model for model, _ in pool.map(lambda _: behavior_model(dataset, BEHAVIOR), range(3))]
    assert len(clones) == 1
    assert differing(models[0].state_dict(), models[2].state_dict()) == set()


def test_the_cache_follows_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("OMCDA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "omcda-deploy"


def test_cloning_keeps_the_best_held_out_model_and_stops(dataset: Dataset) -> None:
    """Random actions cannot be predicted: past a few looks the held-out likelihood only falls."""
    config = BehaviorConfig(steps=5000, batch_size=64, hidden=32, check_every=20, patience=3, lr=5e-3)
    looks: list[tuple[int, float]] = []
    from omcda_deploy.training.behavior_model import fit

    model, report = fit(dataset, config, progress=lambda step, steps, loss: looks.append((step, loss)))
    best_step, best = min(looks, key=lambda look: look[1])
    assert report["best_step"] == best_step
    assert report["held_out_nll"] == best
    assert report["last_step"] == looks[-1][0] == best_step + 3 * 20 < 5000
    again, _ = fit(dataset, config)
    assert differing(model.state_dict(), again.state_dict()) == set()


# -- batches --------------------------------------------------------------------------------------------------


def test_the_time_limit_option_changes_ends_only(dataset: Dataset) -> None:
    every = torch.arange(len(dataset.transitions)).unsqueeze(0)
    ours = TransitionSampler(dataset, 4, [0]).gather(every)
    published = TransitionSampler(dataset, 4, [0], time_limit_is_terminal=True).gather(every)
    assert differing(fields_of(ours), fields_of(published)) == {"not_done", "return_to_go", "return_range"}
    assert np.flatnonzero(ours.not_done == 0).tolist() == np.flatnonzero(dataset.terminal).tolist()
    ends = dataset.terminal | dataset.timeout
    assert np.flatnonzero(published.not_done == 0).tolist() == np.flatnonzero(ends).tolist()
    assert dataset.terminal.sum() == dataset.timeout.sum() == 4


def test_no_transition_crosses_an_episodes_end(dataset: Dataset) -> None:
    sampler = TransitionSampler(dataset, 64, [0])
    assert len(sampler) == 240
    episode_of = np.repeat(
        np.arange(8), dataset.episode_length + 1
    )  # episode of each row, final ones included
    rows = {row.tobytes(): index for index, row in enumerate(dataset.observations)}
    seen = set()
    for step in range(40):
        batch = sampler.sample(step)
        for o, o2, a, r in zip(
            batch.observation[0].numpy(),
            batch.next_observation[0].numpy(),
            batch.action[0].numpy(),
            batch.reward[0].numpy(),
            strict=True,
        ):
            row, following = rows[o.tobytes()], rows[o2.tobytes()]
            assert following == row + 1
            assert episode_of[row] == episode_of[following]
            assert np.array_equal(a, dataset.actions[row])
            assert r == dataset.rewards[row]
            seen.add(row)
        assert np.array_equal(batch.state[0].numpy(), batch.observation[0].numpy().reshape(64, -1))
    assert len(seen) == 240  # every transition is drawn


def test_batches_depend_on_seed_and_step_alone(dataset: Dataset) -> None:
    sampler = TransitionSampler(dataset, 8, [3])
    forward = {step: fields_of(sampler.sample(step)) for step in (0, 1, 255, 256, 1000)}
    other = TransitionSampler(dataset, 8, [3])
    for step in (1000, 0, 256, 255, 1):
        assert differing(forward[step], fields_of(other.sample(step))) == set()
    assert differing(forward[0], forward[1])
    assert differing(forward[0], fields_of(TransitionSampler(dataset, 8, [4]).sample(0)))


def test_a_fleets_batch_is_its_runs_batches_side_by_side(dataset: Dataset) -> None:
    seeds = (7, 3, 3, 0)
    clones = {seed: behavior_model(dataset, dataclasses.replace(BEHAVIOR, seed=seed))[0] for seed in seeds}
    fleet = TransitionSampler(dataset, 8, seeds, behaviors=[clones[seed] for seed in seeds])
    alone = [TransitionSampler(dataset, 8, [seed], behaviors=[clones[seed]]) for seed in seeds]
    for step in (0, 1, 300):
        expected = stacked(*(sampler.sample(step) for sampler in alone))
        assert differing(fields_of(fleet.sample(step)), fields_of(expected)) == set()


def test_batches_hold_the_behavior_policy_at_their_rows(dataset: Dataset) -> None:
    """A table of the whole dataset gives what the model gives for each batch."""
    behavior, _ = behavior_model(dataset, BEHAVIOR)
    batch = TransitionSampler(dataset, 64, [5, 6], behaviors=[behavior] * 2).sample(0)
    with torch.no_grad():
        for ours, observation in (
            (batch.behavior, batch.observation),
            (batch.next_behavior, batch.next_observation),
        ):
            expected = policy_of(behavior, observation, None)
            assert isinstance(ours, TanhGaussian)
            assert isinstance(expected, TanhGaussian)
            torch.testing.assert_close(ours.mean, expected.mean)
            torch.testing.assert_close(ours.log_std, expected.log_std)
            # The recorded actions' part of a density is a table too.
            assert torch.equal(batch.log_prob(expected), expected.log_prob(batch.action))


def fields_of(batch: Batch) -> dict[str, Any]:
    """All fields of a batch, gathered."""
    values = {name: getattr(batch, name) for name in Batch.__annotations__}
    return {k: vars(v) if isinstance(v, (TanhGaussian, Categorical)) else v for k, v in values.items()}


def test_a_state_of_its_own_is_kept_apart(tmp_path: Path) -> None:
    """Batches hold the recorded state if it is not all observations joined."""
    spec: TeamSpec = continuous_spec()
    recorded = read(write_dataset(tmp_path / "d.hdf5", spec, [20, 20]))
    batch = TransitionSampler(recorded, 4, [0, 1]).gather(torch.tensor([[0, 19, 20], [1, 2, 3]]))
    assert np.array_equal(batch.state.numpy(), recorded.states[[[0, 19, 21], [1, 2, 3]]])
    assert np.array_equal(batch.next_state.numpy(), recorded.states[[[1, 20, 22], [2, 3, 4]]])


# -- evaluation beside training -------------------------------------------------------------------------------


def test_a_snapshot_acts_as_its_policy_does(run: Path, dataset: Dataset) -> None:
    team, snapshot = SnapshotTeam(run, 40), read_snapshot(run, 40)
    rows = dataset.observations[:7]
    decisions = team.act({name: rows[:, i] for i, name in enumerate(team.spec.names)})
    with torch.no_grad():
        policy = policy_of(snapshot.policy, torch.from_numpy(rows), None)
        behavior = policy_of(snapshot.behavior, torch.from_numpy(rows), None)
    assert isinstance(policy, TanhGaussian)
    assert isinstance(behavior, TanhGaussian)
    for i, name in enumerate(team.spec.names):
        np.testing.assert_array_equal(decisions[name].action, torch.tanh(policy.mean).numpy()[:, i])
        np.testing.assert_array_equal(decisions[name].divergence, policy.kl(behavior).numpy()[:, i])
    noise = NoiseSource(team.spec, 3, temperature=0.5).draw(7)
    sampled = team.act({name: rows[:, i] for i, name in enumerate(team.spec.names)}, noise=noise)
    for i, name in enumerate(team.spec.names):
        beneath = policy.mean[:, i] + policy.log_std[:, i].exp() * torch.from_numpy(noise[name])
        np.testing.assert_array_equal(sampled[name].action, torch.tanh(beneath).numpy())


def test_a_snapshot_of_choices_samples_among_the_available_ones() -> None:
    """Its frequencies are softmax(logits / T) of what the mask allows."""
    spec, temperature, rows = discrete_spec(), 0.5, 20_000
    actor = behavior_actor(spec)
    team = SnapshotTeam.__new__(SnapshotTeam)
    team.spec = spec
    team._snapshot = cast("Any", SimpleNamespace(policy=actor, behavior=actor))
    seen = {agent.name: np.ones((rows, agent.observation_size), np.float32) for agent in spec.agents}
    masks = {agent.name: np.ones((rows, agent.action.size), np.uint8) for agent in spec.agents}
    for mask in masks.values():
        mask[:, 0] = 0
    noise = NoiseSource(spec, 0, temperature).draw(rows)
    decisions = team.act(seen, noise=noise, action_masks=masks)
    greedy = team.act(seen, action_masks=masks)
    observation = torch.zeros(1, 2, spec.observation_size)
    available = torch.zeros(1, 2, spec.action_size, dtype=torch.uint8)
    for i, agent in enumerate(spec.agents):
        observation[0, i, : agent.observation_size] = 1.0
        available[0, i, 1 : agent.action.size] = 1
    with torch.no_grad():
        policy = policy_of(actor, observation, available)
    assert isinstance(policy, Categorical)
    for i, agent in enumerate(spec.agents):
        logits = policy.log_probs.reshape(2, -1)[i, : agent.action.size]
        expected = torch.softmax(logits / temperature, -1).numpy()
        counts = np.bincount(decisions[agent.name].action, minlength=agent.action.size)
        assert counts / rows == pytest.approx(expected, abs=0.015)
        assert set(greedy[agent.name].action.tolist()) == {int(logits.argmax())}


def test_a_snapshot_is_played_and_its_returns_are_noted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("20", "60"):
        monkeypatch.setattr(sys, "argv", ["evaluation", str(run), step, "--episodes", "2"])
        evaluation.main()
    lines = [json.loads(line) for line in (run / EVALUATIONS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 60]
    for line in lines:
        assert len(line["returns"]) == 2
        np.testing.assert_allclose(line["mean"], np.mean(line["returns"]))


def test_the_evaluator_starts_one_process_per_chosen_snapshot(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as two; the others wait for them."""
    started: list[str] = []
    living: list[Process] = []

    class Process:
        returncode: int | None = None

        def __init__(self, command: list[str], **options: Any) -> None:
            assert command[-2] == str(run)
            started.append(command[-1])
            living.append(self)
            assert len(living) <= Evaluator.MOST

        def poll(self) -> int | None:
            return self.returncode

        def wait(self) -> int:
            living.remove(self)
            self.returncode = 0
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    evaluator = Evaluator(run, 40)
    for step in (20, 40, 60, 80, 100, 120, 160):
        evaluator.start(step)
    assert started == ["40", "80"]
    living[0].wait()
    evaluator.start(180)
    assert started == ["40", "80", "120"]
    evaluator.wait()
    assert started == ["40", "80", "120", "160"]
    assert not living
    assert read_config(run).steps == STEPS


def test_a_resumed_run_has_one_line_per_evaluation_in_the_order_of_steps(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a kill left behind the checkpoint is forgotten, and what it kept from being made is made."""
    started: list[str] = []

    class Ended:
        returncode = 0

        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command[-1])

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Ended)
    left = "".join(json.dumps({"step": step, "mean": 1.0}) + "\n" for step in (60, 20, 60))
    (run / EVALUATIONS).write_text(left + '{"step": 4')
    Evaluator(run, 20).catch_up(40)
    lines = [json.loads(line) for line in (run / EVALUATIONS).read_text().splitlines()]
    assert ([line["step"] for line in lines], started) == ([20], ["40"])
    monkeypatch.setattr(sys, "argv", ["evaluation", str(run), "20", "--episodes", "2"])
    evaluation.main()
    [line] = [json.loads(line) for line in (run / EVALUATIONS).read_text().splitlines()]
    assert (line["step"], len(line["returns"])) == (20, 2)
