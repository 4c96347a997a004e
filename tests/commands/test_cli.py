"""The command line: wrong input gives status 2, one line on stderr, and nothing half-written."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from omcda_deploy import cli
from omcda_deploy.bundle import MODEL_FILE, read_bundle
from omcda_deploy.commands import training_view
from omcda_deploy.commands.train import _print_next
from omcda_deploy.plugins import Column, columns_of
from omcda_deploy.registry import load_algorithm, team_spec
from tests.support.bundles import write_test_bundle
from tests.support.synthetic import write_dataset

HOPPER = "mamujoco/hopper-3x1"
TINY = ("--set", "hidden=8", "--set", "batch_size=8", "--behavior-steps", 5, "--steps", 10)
LIMIT_S = 60
DOWN = "127.0.0.1:9"  # the discard port: nothing listens there

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a dataset, a run, a bundle for Hopper and one for HalfCheetah, and damaged ones."""
    folder = tmp_path_factory.mktemp("place")
    spec = team_spec(HOPPER)
    write_dataset(folder / "data.hdf5", spec, [30, 20])
    whole = (folder / "data.hdf5").read_bytes()
    (folder / "truncated.hdf5").write_bytes(whole[: len(whole) // 2])
    (folder / "text.hdf5").write_text("not HDF5")
    save(folder / "shape.hdf5", a=np.zeros((20, 2, 1)))
    save(folder / "other-team.hdf5", o=np.zeros((20, 3, 15)), s=np.zeros((20, 3, 15)))
    save(folder / "nan.hdf5", o=np.where(np.arange(20)[:, None, None] == 7, np.nan, np.ones((20, 3, 14))))
    save(folder / "infinite.hdf5", r=np.where(np.arange(20)[:, None] == 4, np.inf, 0.0))
    save(folder / "missing.hdf5", d=None)
    write_test_bundle(folder / "bundle", spec)
    write_test_bundle(folder / "cheetah", team_spec("mamujoco/halfcheetah-6x1"))
    shutil.copytree(folder / "bundle", folder / "changed")
    model = folder / "changed" / "agent_1" / MODEL_FILE
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    shutil.copytree(folder / "bundle", folder / "incomplete")
    (folder / "incomplete" / "team" / MODEL_FILE).unlink()
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("…")

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"not refused within {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(folder / "cache"))
        run(patch, "train", folder / "data.hdf5", "--algo", "bc", *TINY, "--out", folder / "run")
        yield folder
    signal.signal(signal.SIGALRM, previous)


def save(path: Path, **changes: Any) -> None:
    """Write a file like OMIGA's for Hopper, with arrays changed or left out."""
    arrays: dict[str, Any] = {
        "o": np.ones((20, 3, 14)),
        "s": np.ones((20, 3, 14)),
        "a": np.zeros((20, 3, 1)),
        "r": np.zeros((20, 1)),
        "d": (np.arange(20) % 10 == 9).astype(float)[:, None],
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is not None:
                file[name] = values


def run(patch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process and return its exit status; a command that does not end is an error."""
    patch.setattr(sys, "argv", ["omcda-deploy", *map(str, words)])
    signal.alarm(LIMIT_S)
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.alarm(0)
    return 0


@pytest.fixture
def refuse(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command in ``place`` and return its one line of error."""

    def check(*words: object) -> str:
        monkeypatch.chdir(place)
        files = sorted(place.rglob("*"))
        status = run(monkeypatch, *words)
        out, err = capsys.readouterr()
        assert status == 2, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert out == ""
        assert sorted(place.rglob("*")) == files, "a file was left behind"
        return err.removeprefix("error: ").rstrip("\n")

    return check


FILES = {
    "none.hdf5": r"none\.hdf5: no such file\. Make a dataset with  omcda-deploy collect",
    "truncated.hdf5": r"truncated\.hdf5 is truncated or not HDF5: copy or collect it again",
    "text.hdf5": r"text\.hdf5 is truncated or not HDF5",
    "shape.hdf5": r"array a: expected shape \[20, 3, …\], got \[20, 2, 1\]",
    "other-team.hdf5": r"does not say of which task it is, and 3 agents with observations of 15 .*: name the task",
    "nan.hdf5": r"array o holds NaN or infinity, first in row 7",
    "infinite.hdf5": r"array r holds NaN or infinity, first in row 4",
    "missing.hdf5": r"expected arrays o, s, a, r, d, found no d",
    "data.csv": r"expected a file name ending in one of",
}


@pytest.mark.parametrize("command", ["train", "inspect", "replay"])
@pytest.mark.parametrize("file", FILES)
def test_bad_datasets(refuse: Refuse, command: str, file: str) -> None:
    words: dict[str, tuple[object, ...]] = {
        "train": ("train", file, "--out", "new"),
        "inspect": ("inspect", "dataset", file),
        "replay": ("replay", file, "--bundle", "bundle"),
    }
    assert_matches(refuse(*words[command]), FILES[file])


def assert_matches(line: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(line)


Case = tuple[str, str]
CASES: list[Case] = [
    # unknown names
    ("train data.hdf5 --algo omcdaa --out new", "unknown algorithm 'omcdaa': did you mean 'omcda'"),
    (
        "train data.hdf5 --task mamujoco/hoper-3x1 --out new",
        "unknown task .*: did you mean 'mamujoco/hopper-3x1'",
    ),
    ("train data.hdf5 --set d_tott=1 --out new", "unknown setting of omcda 'd_tott': did you mean 'd_tot'"),
    ("train data.hdf5 --algo bc --d-tot 1 --out new", "unknown setting of bc 'd_tot'"),
    ("collect mamujoco/hoper-3x1 --out new.hdf5", "unknown task .*: did you mean 'mamujoco/hopper-3x1'"),
    (f"collect {HOPPER} --tier medum --out new.hdf5", "unknown tier .*'medum': did you mean 'medium'"),
    ("evaluate mamujoco/hoper-3x1 --bundle bundle", "unknown task .*: did you mean 'mamujoco/hopper-3x1'"),
    ("inspect dataset shape.hdf5 --task mamujoco/hopper", "expected shape|unknown task"),
    ("bench train --task mamujoco/hoper-3x1", "unknown task .*: did you mean 'mamujoco/hopper-3x1'"),
    ("serve bundle --agent agent_9 --port 0", "unknown agent 'agent_9': .* agent_0, agent_1, agent_2"),
    # settings
    ("train data.hdf5 --set d_tot --out new", "--set: expected name=value, got 'd_tot'"),
    (
        "train data.hdf5 --set lr=1e-3 --set lr=1e-4 --out new",
        "--set: expected lr once, got '1e-3' and '1e-4'",
    ),
    ("train data.hdf5 --d-tot 1 --set d_tot=2 --out new", "expected --d-tot or --set d_tot=, got both"),
    (
        "train data.hdf5 --recipe paper --set recipe=a --out new",
        "expected --recipe or --set recipe=, got both",
    ),
    ("choose-budget data.hdf5 --set lr=1e-3 --set lr=1e-4", "--set: expected lr once, got '1e-3' and '1e-4'"),
    ("choose-budget data.hdf5 --set d_tot=2", "d_tot: it is chosen here, got '2': leave it out"),
    ("behavior ship run --tier poor=1 --tier poor=2 --out new", "--tier: expected poor once, got 1 and 2"),
    ("train data.hdf5 --set d_tot=much --out new", r"omcda\.d_tot: expected float, got 'much'"),
    ("train data.hdf5 --set d_tot=nan --out new", r"omcda\.d_tot: expected 1e-06 to 1000, got nan"),
    ("train data.hdf5 --d-tot -1 --out new", r"omcda\.d_tot: expected 1e-06 to 1000, got -1\.0"),
    ("train data.hdf5 --set allocation=fair --out new", r"omcda\.allocation: expected one of .*, got 'fair'"),
    ("train data.hdf5 --steps 0 --out new", "steps: expected at least 1, got 0"),
    ("train data.hdf5 --seed -1 --out new", "seed: expected 0 to .*, got -1"),
    ("train data.hdf5 --threads 0 --out new", "threads: expected at least 1, got 0"),
    ("train data.hdf5 --behavior-steps 0 --out new", r"BehaviorConfig\.steps: expected 1 to .*, got 0"),
    (
        "train data.hdf5 --checkpoint-every 0 --out new",
        "checkpoint_every: expected a multiple of 100, .* got 0",
    ),
    (
        "train data.hdf5 --snapshot-every 150 --out new",
        "snapshot_every: expected a multiple of 100, .* got 150",
    ),
    ("train data.hdf5 --evaluate-every 0 --out new", "evaluate_every: expected at least 1, got 0"),
    (
        "train data.hdf5 --snapshot-every 300 --evaluate-every 500 --out new",
        "evaluate_every: expected a multiple of 300, as policies are kept, got 500",
    ),
    (
        "train data.hdf5 --evaluate-every 150 --out new",
        "snapshot_every: expected a multiple of 100, as metrics are logged, got 150",
    ),
    ("train --resume run --evaluate-every 350", "evaluate_every: expected a multiple of 100, .* got 350"),
    (f"collect {HOPPER} --temperature 0,1 --out new.hdf5", "--temperature: expected one number, got '0,1'"),
    (
        f"collect {HOPPER} --temperature nan --out new.hdf5",
        "temperature: expected a number from 0 .* got nan",
    ),
    ("replay data.hdf5 --bundle bundle --temperature -1", r"temperature: expected a number .* got -1\.0"),
    (
        f"evaluate {HOPPER} --bundle bundle --temperature 0,a",
        "--temperature: expected numbers such as .*'0,a'",
    ),
    (
        f"evaluate {HOPPER} --bundle bundle --temperature=",
        "--temperature: expected numbers such as .* got ''",
    ),
    (f"evaluate {HOPPER} --bundle bundle --temperature 0,0", "temperatures: expected each once, got 0 twice"),
    (
        f"evaluate {HOPPER} --bundle bundle --temperature 0,1 --video new.mp4",
        "--video: expected one --temperature, got 0,1",
    ),
    ("train data.hdf5 --device tpu --out new", "device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ("train data.hdf5", "expected a dataset and --out for a new run, or --resume RUN"),
    ("train --out new", "expected a dataset and --out for a new run, or --resume RUN"),
    (f"collect {HOPPER} --transitions 0 --out new.hdf5", "transitions of at least 1"),
    ("train data.hdf5 --seeds 0,x --out new", "--seeds: expected numbers such as 0,1,2, got '0,x'"),
    (
        "train data.hdf5 --seeds 0,0 --out new",
        r"seeds: expected one or more numbers, each once, got \[0, 0\]",
    ),
    ("train data.hdf5 --seeds 0,1 --seed 2 --out new", "expected --seed or --seeds, got both"),
    ("train data.hdf5 --seeds 0,1 --seed 0 --out new", "expected --seed or --seeds, got both"),
    ("train data.hdf5 --seeds 0,-1 --out new", "seed: expected 0 to 4294967295, got -1"),
    (f"collect {HOPPER} --seed -1 --out new.hdf5", "seed of at least 0"),
    (
        "merge data.hdf5 data.hdf5 --out new.hdf5",
        "hold the same episodes: record each with a --seed of its own",
    ),
    ("train-jobs []", "expected one or more jobs, got none"),
    ("train-jobs nonsense", "expected jobs as a sweep writes them, got 'nonsense'"),
    ('train-jobs [{"run":"new"}]', "expected jobs as a sweep writes them, got"),
    ("merge data.hdf5 none.hdf5 --out new.hdf5", r"none\.hdf5: no such file"),
    ("merge data.hdf5 --out data.hdf5", "exists already"),
    (f"collect {HOPPER} --workers 0 --num-envs 0 --out new.hdf5", "num_envs: expected 1 to 100,000, got 0"),
    (f"evaluate {HOPPER} --bundle bundle --episodes 0", "episodes: expected at least 1, got 0"),
    ("replay data.hdf5 --bundle bundle --batch 0", "batch: expected at least 1, got 0"),
    # folders that are there, or are not what they should be
    ("train data.hdf5 --out taken", "taken exists already: choose another --out, or continue it with"),
    ("export run --out taken", "taken exists already: choose another --out, or remove it first"),
    (
        f"collect {HOPPER} --out data.hdf5",
        "data.hdf5 exists already: choose another --out, or remove it first",
    ),
    ("train --resume taken", r"taken is not a run folder: it has no config\.json"),
    ("train --resume nowhere", r"nowhere is not a run folder"),
    ("train --resume run --steps 20", "--resume continues a run as it was begun: leave --steps out"),
    ("train --resume run --set lr=1", "--resume continues a run as it was begun: leave --set out"),
    ("train other.hdf5 --resume run", "no such file"),
    ("export taken --out new", "taken is not a run folder"),
    ("export run --step 7 --out new", "run holds no policy of step 7: it has 10"),
    ("serve taken", "taken: expected a bundle, or a folder of bundles named 1, 2, …, found none"),
    # bundles
    ("inspect bundle changed", r"agent_1/1/model\.onnx was changed after export: expected sha256 \w{12}…"),
    ("serve changed", "was changed after export"),
    ("serve changed --team", "was changed after export"),
    (f"evaluate {HOPPER} --bundle changed", "was changed after export"),
    ("replay data.hdf5 --bundle changed", "was changed after export"),
    (f"collect {HOPPER} --bundle changed --out new.hdf5", "was changed after export"),
    (f"evaluate {HOPPER} --bundle incomplete", r"team/1/model\.onnx is missing: the bundle is incomplete"),
    ("serve bundle --agent agent_0 --team", "expected --agent or --team, got both"),
    ("serve bundle --team --port 99999", "expected a port from 0 to 65535, got 99999"),
    # teams
    (
        f"evaluate {HOPPER} --endpoints 127.0.0.1:9-7",
        "127.0.0.1:9-7: expected ports from the lower to the higher",
    ),
    (
        "collect toy/chain --out x.hdf5 --bundle bundle --tier behavior",
        "expected one of --tier, --bundle, --policy, got --tier and --bundle",
    ),
    (f"evaluate {HOPPER}", "expected --endpoints .* or --bundle .*: give one of them"),
    (
        f"evaluate {HOPPER} --demo",
        f"--demo has a task .* of its own, got a TASK {HOPPER}: leave one of them out",
    ),
    ("evaluate --demo --bundle bundle", "--demo has .* a bundle of its own, got --bundle bundle"),
    ("evaluate --demo --env lift:Lift", "--demo has a task .*, got --env lift:Lift"),
    ("serve", "expected a BUNDLE, or --demo .*: give one of them"),
    ("serve bundle --demo", "expected a BUNDLE, or --demo .*: give one of them"),
    (f"evaluate {HOPPER} --bundle bundle --endpoints {DOWN}", "expected --endpoints .* or --bundle"),
    (
        f"evaluate {HOPPER} --endpoints {DOWN} --on-miss behavior",
        "--on-miss behavior: expected --bundle, whose",
    ),
    (f"evaluate {HOPPER} --bundle bundle --endpoints {DOWN} --on-miss hold", "leave one of them out"),
    (
        f"replay data.hdf5 --endpoints {DOWN} --on-miss behavior",
        "--on-miss behavior: expected --bundle, whose",
    ),
    (f"evaluate {HOPPER} --endpoints {DOWN} --bundle changed --on-miss behavior", "was changed after export"),
    ("replay data.hdf5", "expected --endpoints .* or --bundle"),
    (f"evaluate {HOPPER} --endpoints {DOWN}", rf"{DOWN}: GetContract"),
    (f"replay data.hdf5 --endpoints {DOWN}", rf"{DOWN}: GetContract"),
    (f"evaluate {HOPPER} --endpoints ,", "expected at least one endpoint, got none"),
    *(
        (f"{line} --bundle bundle {option}", f"{option}: expected --endpoints, wh.*, got none: leave it out")
        for line in (f"evaluate {HOPPER}", "replay data.hdf5")
        for option in (
            *("--on-miss raise", "--on-miss behavior", "--credentials c.toml", "--deadline 1.0", "--stream"),
            *("--wait 0.0", "--protocol omcda", "--version 2"),
        )
    ),
    # contracts
    (
        f"evaluate {HOPPER} --bundle cheetah",
        r"the team .* and the simulator .* do not fit together: agents: 6 entries",
    ),
    ("replay data.hdf5 --bundle cheetah", "do not fit together: agents: "),
    (f"collect {HOPPER} --workers 0 --bundle cheetah --out new.hdf5", "do not fit together: agents: "),
    ("train data.hdf5 --task mamujoco/halfcheetah-6x1 --out new", "do not fit together: agents: "),
    # the command line itself
    ("traim data.hdf5", "No such command 'traim'. Did you mean 'train'.*: see  omcda-deploy --help$"),
    ("train data.hdf5 --steps 1e3 --out new", "'--steps'.*valid integer.*: see  omcda-deploy train --help$"),
    ("collect toy/masked", "Missing option '--out': see  omcda-deploy collect --help$"),
    ("settings omcdaa", "unknown algorithm 'omcdaa': did you mean 'omcda'"),
    ("settings bc toy/maskd", "unknown task 'toy/maskd': did you mean 'toy/masked'"),
    ("inspect nothing", "nothing: no such file or folder: expected a dataset, a bundle or a run folder"),
    ("inspect taken", "taken: expected a dataset, a bundle or a run folder, found a folder of none"),
    ("train data.hdf5 --threads 100000 --out new", "threads: expected at most 1024, got 100000"),
    ("subset data.hdf5 --episodes 0-99999999999 --out new.hdf5", "--episodes: expected at most 10000000"),
    ("toy-results --steps 0 --table new.md", "'--steps'.* greater than or equal to 1"),
    ("behavior train mamujoco/hopper-3x1 --seed -1 --out new", "'--seed'.* greater than or equal to 0"),
    ("behavior measure run", r"run/config\.json is not of  omcda-deploy behavior train"),
    (
        "behavior train mamujoco-khop1/hopper-3x1 --record new.hdf5 --out new",
        "--record: the training .* is not",
    ),
    # outputs
    (
        f"evaluate {HOPPER} --bundle bundle --json no/where.json",
        "the folder no does not exist, create it first",
    ),
    (
        "replay data.hdf5 --bundle bundle --report no/where.html",
        "the folder no does not exist, create it first",
    ),
    *(
        (f"{command} --{option} bundle", "bundle is a folder: expected a name for the file, such as bundle/")
        for command in (f"evaluate {HOPPER} --bundle bundle", "replay data.hdf5 --bundle bundle")
        for option in ("json", "report")
    ),
    (f"evaluate {HOPPER} --bundle bundle --video bundle", "bundle is a folder: expected a name for the file"),
    (
        "replay data.hdf5 --bundle bundle --json same --report ./same",
        "same: expected a file for each output, got this one twice: name another",
    ),
    (
        f"evaluate {HOPPER} --bundle bundle --json same --report same",
        "same: expected a file for each output, got this one twice: name another",
    ),
    ("choose-budget data.hdf5 --json no/where.json", "the folder no does not exist, create it first"),
    ("bench train --json bundle", "bundle is a folder: expected a name for the file"),
    ("compare bundle --out data.hdf5", "data.hdf5 is a file: expected a folder to write to"),
    ("demo --out data.hdf5/demo", r"cannot write data.hdf5/demo \(Not a directory\): choose another place"),
    ("export bundle --out data.hdf5/b", "bundle is not a run folder"),
    (
        "train data.hdf5 --out data.hdf5/run",
        r"cannot write data.hdf5/run \(Not a directory\): choose another",
    ),
]


@pytest.mark.parametrize(("words", "message"), CASES, ids=[words for words, _ in CASES])
def test_bad_requests(refuse: Refuse, words: str, message: str) -> None:
    assert_matches(refuse(*words.split(" ")), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refuse: Refuse) -> None:
    line = refuse("train", "data.hdf5", "--device", "cuda", "--out", "new")
    assert_matches(line, r"device cuda: this torch sees no GPU\. Use --device cpu")


def test_the_data_of_another_run_are_refused(refuse: Refuse, place: Path) -> None:
    write_dataset(place / "later.hdf5", team_spec(HOPPER), [30, 20], seed=5)
    assert_matches(
        refuse("train", "later.hdf5", "--resume", "run"), r"was trained on a dataset of digest \w+…"
    )


def test_a_damaged_run_is_named(refuse: Refuse, place: Path) -> None:
    shutil.copytree(place / "run", place / "damaged")
    (place / "damaged" / "resume.pt").write_bytes(b"half")
    assert_matches(refuse("train", "--resume", "damaged"), r"resume\.pt is damaged")
    (place / "damaged" / "policies" / "step-00000010.pt").write_bytes(b"half")
    assert_matches(refuse("export", "damaged", "--out", "new"), r"step-00000010\.pt is damaged")
    (place / "damaged" / "timing.json").write_text("{")
    assert_matches(refuse("inspect", "damaged"), r"timing\.json is damaged")
    (place / "damaged" / "policies" / "step-best.pt").touch()  # a user's own
    assert_matches(
        refuse("export", "damaged", "--step", "7", "--out", "new"), "no policy of step 7: it has 10"
    )
    (place / "damaged" / "config.json").write_text("{")
    assert_matches(refuse("export", "damaged", "--out", "new"), r"config\.json is damaged")


def test_training_that_diverges_ends_with_the_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "huge.hdf5", team_spec(HOPPER), [30, 20], reward_scale=1e30)
    assert run(monkeypatch, "train", tmp_path / "huge.hdf5", *TINY, "--out", tmp_path / "new") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert_matches(last, r"^error: training diverged before step 10: loss/reward_critic is inf\. Lower")


def test_a_process_of_its_own_ends_the_same_way(place: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "omcda_deploy.cli", "inspect", "bundle", str(place / "changed")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert_matches(process.stderr, r"\Aerror: .* was changed after export: [^\n]*\n\Z")


def test_the_export_of_a_run_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (3, 0):
        (tmp_path / "my runs" / f"seed{seed}").mkdir(parents=True)
    (tmp_path / "my runs" / "seed3" / "config.json").touch()
    for folder, exported in (("my runs/seed3", "my runs/seed3"), ("my runs", "my runs/seed0")):
        _print_next(tmp_path / folder)
        pasted = capsys.readouterr().out.partition("  ")[2]
        assert shlex.split(pasted) == ["omcda-deploy", "export", str(tmp_path / exported), "--out", "BUNDLE"]


def test_train_export_and_resume_where_the_data_moved(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The commands of the refusals above succeed on right input."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMCDA_CACHE", "cache")
    shutil.copy(place / "data.hdf5", "data.hdf5")
    assert run(monkeypatch, "train", "data.hdf5", *TINY, "--out", "run") == 0
    out, err = capsys.readouterr()
    assert "trained run: export it with  omcda-deploy export run --out BUNDLE" in out
    recipe, cloned, trained, *_ = err.splitlines()
    assert recipe == "recipe of mamujoco: d_tot=0.03 tau=0.03"
    assert cloned.startswith("cloning the behaviour policy: step 5 of at most 5, held-out NLL ")
    assert trained.startswith("step 10 of 10: policy ")
    assert json.loads(Path("run/config.json").read_text())["behavior"]["hidden"] == 8

    Path("data.hdf5").rename("moved.hdf5")
    assert run(monkeypatch, "train", "--resume", "run") == 2
    assert run(monkeypatch, "train", "moved.hdf5", "--resume", "run") == 0
    assert run(monkeypatch, "export", "run", "--out", "bundle") == 0
    assert run(monkeypatch, "train", "moved.hdf5", *TINY, "--seeds", "0,3", "--out", "runs") == 0
    assert "export one with  omcda-deploy export runs/seed" in capsys.readouterr().out
    assert Path("runs/seed0/metrics.jsonl").read_text() == Path("run/metrics.jsonl").read_text()
    assert run(monkeypatch, "train", "moved.hdf5", "--resume", "runs", "--seeds", "3") == 0
    assert run(monkeypatch, "train", "moved.hdf5", "--resume", "runs", "--seeds", "4") == 2
    capsys.readouterr()
    assert run(monkeypatch, "train", "moved.hdf5", "--resume", "runs") == 0
    assert "export one with  omcda-deploy export runs/seed" in capsys.readouterr().out
    bundle = read_bundle("bundle")
    assert bundle.manifest["training"]["algorithm"] == "omcda"
    assert bundle.manifest["training"]["step"] == 10
    assert sum(budget or 0.0 for budget in bundle.budgets.values()) == pytest.approx(0.03)


def test_a_terminal_shows_a_bar_and_the_numbers_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(training_view, "stderr", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    per_agent = {"kl": (0.0123, 0.2), "budget": (0.1, 0.3), "alpha": (3.0, 50.0), "influence": (-1.0, 2.0)}
    metrics = {
        f"{name}/{agent}": v for name, pair in per_agent.items() for agent, v in zip("ab", pair, strict=True)
    }
    metrics |= {"alpha_at_bound/a": 0.0, "alpha_at_bound/b": 1.0, "loss/policy": 1.5, "z/mean_exp": 0.97}
    with training_view.TrainingView() as view:
        view.show(400, ("a", "b"), columns_of(load_algorithm("omcda")))
        view.cloning(500, 1000, -0.125)
        assert "cloning the behaviour policy, held-out NLL -0.125 nats" in screen.getvalue()
        view.logged(100, {**metrics, "dual_active": 0.0})
        assert "prices wait for the reward critic" in screen.getvalue()
        screen.truncate(0)
        view.logged(200, {**metrics, "dual_active": 1.0})
    printed = screen.getvalue()
    for text in ("200/400", "0.0123", "0.1000", "3.000", "-1.000", "b (alpha at its bound)", "policy 1.5"):
        assert text in printed, text
    assert "mean exp z 0.97" in printed
    assert "a (alpha" not in printed
    assert "prices wait" not in printed


def test_elsewhere_about_twenty_lines_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with training_view.TrainingView() as view:
        view.show(10_000, ("a", "b"), columns_of(load_algorithm("omcda")))
        for step in range(100, 10_001, 100):
            view.logged(step, {"loss/policy": 0.5, "kl/a": 0.25, "kl/b": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[-1] == "step 10000 of 10000: policy 0.5  sum of KL 0.7500 nats"


def test_another_algorithms_columns_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(training_view, "stderr", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    columns = (
        Column("regret", "regret of play", digits=1),
        Column("stuck", "stuck", flag=True),
        Column("entropy", "entropy", per_agent=False),
        Column("absent", "never logged"),
    )
    with training_view.TrainingView() as view:
        view.show(10, ("a", "b"), columns)
        view.logged(
            5,
            {"regret/a": 0.25, "regret/b": 7.0, "stuck/a": 1.0, "stuck/b": 0.0, "entropy": 0.5, "kl/a": 9.0},
        )
    printed = screen.getvalue()
    for text in ("regret of play", "0.2", "7.0", "a (stuck)", "entropy 0.5"):
        assert text in printed, text
    for text in ("b (stuck)", "never logged", "KL", "9.0"):
        assert text not in printed, text
