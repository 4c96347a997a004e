"""Users' own environments and policies on the command line: what is wrong is one line and exit status 2."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy import cli
from omcda_deploy.errors import ConfigError
from omcda_deploy.references import require_trusted, trust
from omcda_deploy.registry import read_dataset
from tests.support.own_simulators import HOSTILE

ROOT = Path(__file__).parents[2]
OWN = "tests.support.own_simulators"
COLLECT = f"collect --env {OWN}:Reach --out data.hdf5 --transitions 20 --num-envs 2 --workers 0"
RANDOM = f"{COLLECT} --tier random"
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(line)`` in an empty folder -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # evaluations beside training are a process of their own
    monkeypatch.setenv("OMCDA_TRUSTED_REFERENCES", "")
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / ".cache"))

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omcda-deploy", *line.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "collect --out data.hdf5",
            "expected a TASK, or --env module:callable in its place: give one of them",
        ),
        (
            f"collect toy/chain --env {OWN}:Reach --out data.hdf5",
            "expected a TASK, or --env .*: give one of them",
        ),
        (
            "collect --env warehouse --out data.hdf5",
            "--env: expected module:callable, such as warehouse:make, got",
        ),
        ("collect --env toy/chain --out data.hdf5", "--env: expected module:callable"),
        ("collect warehouse --out data.hdf5", "unknown task 'warehouse'"),
        (
            "collect --env nowhere:make --tier random --out data.hdf5",
            "found no module nowhere, neither installed",
        ),
        (
            COLLECT,
            "Reach comes without behaviour policies: use --tier random, or record a policy of your own",
        ),
        (f"{COLLECT} --tier rndom", "comes without behaviour policies"),
        (
            "collect toy/chain --tier rndom --out data.hdf5",
            "unknown tier of toy/chain 'rndom': did you mean 'random'",
        ),
        (
            f"{RANDOM} --temperature 0",
            "tier random: its actions are uniform, expected --temperature 1, got 0",
        ),
        (f"{RANDOM} --temperature 0.5", "tier random: its actions are uniform"),
        (
            f"{RANDOM} --policy {OWN}:toward",
            "expected one of --tier, --bundle, --policy, got --tier and --policy",
        ),
        (f"{COLLECT} --bundle b --policy {OWN}:toward", "got --bundle and --policy: leave one out"),
        (f"{COLLECT} --policy {OWN}:towards", "has no towards: did you mean 'toward'"),
        (f"{COLLECT} --policy toward", "'toward': expected module:callable"),
        (
            f"{COLLECT} --policy {OWN}:too_far",
            "arm answered with the action .* environment 0, step 1, expected numb",
        ),
        (
            f"{COLLECT} --policy {OWN}:failing",
            r"the policy raised KeyError: 'leg' \(.*own_simulators\.py, line",
        ),
        (
            f"{COLLECT} --policy {OWN}:leaving",
            r"leaving: the policy raised SystemExit: 0 \(.*own_sim\S+, line",
        ),
        (
            RANDOM.replace(":Reach", ":leaves"),
            r"leaves: step\(\) 5 raised SystemExit \(.*own_simulators\.py, line",
        ),
        (f"{RANDOM} --simulator-python x", "has no option python: expected spoil; leave it out"),
        ("collect toy/chain --tier random --out data.hdf5 --reward sum", "toy/chain has no option reward"),
        (f"evaluate --env {OWN}:Reach", r"expected --endpoints .* or --bundle"),
        ("evaluate --bundle b", "expected a TASK, or --env module:callable in its place"),
        (f"evaluate --env {OWN}:Reach --bundle missing", "missing"),
        (f"evaluate --env {OWN}:Reach --bundle b --video v.mp4", "b"),
    ],
)
def test_what_is_wrong_is_one_line(line: str, message: str, run: Run, tmp_path: Path) -> None:
    status, out, err = run(line)
    assert status == 2
    assert re.search(message, err), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert [path for path in tmp_path.iterdir() if path.name != ".cache"] == []


@pytest.mark.parametrize("case", ["other reward", "one dies", "observation nan", "four values"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_hostile_environment_ends_the_command_and_leaves_nothing(
    case: str, workers: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import own_simulators

    if workers:
        (tmp_path / "bad.py").write_text(f"from {OWN} import hostile\ndef make(): return hostile({case!r})\n")
        reference = "bad:make"
    else:
        monkeypatch.setattr(own_simulators, "bad", lambda: own_simulators.hostile(case), raising=False)
        reference = f"{OWN}:bad"
    before = sorted(tmp_path.iterdir())
    line = f"collect --env {reference} --out d.hdf5 --transitions 20 --num-envs 1 --tier random --workers {workers}"
    status, _, err = run(line)
    sys.modules.pop("bad", None)
    assert status == 2
    assert re.fullmatch(rf"error: {reference}, step 5: {HOSTILE[case][1]}.*\n", err)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_rewards_join_as_asked(run: Run) -> None:
    line = f"collect --env {OWN}:unequal_rewards --tier random --transitions 20 --num-envs 2 --workers 0"
    assert "--reward sum or mean" in run(f"{line} --out a.hdf5")[2]
    assert run(f"{line} --out a.hdf5 --reward sum")[0] == 0
    assert run(f"{line} --out b.hdf5 --reward mean")[0] == 0
    returns = [read_dataset(Path(name)).episode_returns.tolist() for name in ("a.hdf5", "b.hdf5")]
    assert returns == [[36.0, 36.0], [12.0, 12.0]]
    assert "Invalid value for '--reward'" in run(f"{line} --out c.hdf5 --reward most")[2]


def test_the_rule_of_rewards_is_written_down_and_holds_wherever_a_team_is_played(run: Run) -> None:
    env = f"--env {OWN}:unequal_rewards"
    collect = f"collect {env} --tier random --transitions 20 --num-envs 1 --workers 0"
    assert run(f"{collect} --out data.hdf5 --reward sum")[0] == 0
    assert read_dataset(Path("data.hdf5")).metadata["reward"] == "sum"
    small = "--algo bc --steps 100 --behavior-steps 10 --set hidden=8 --set batch_size=8 --evaluate-every 100"
    train = f"train data.hdf5 {small} {env} --out runs/bc"
    status, _, err = run(train)
    assert (status, Path("runs").exists()) == (2, False)  # before anything is cloned
    assert "Choose how they join, with --reward sum or mean" in err
    assert run(f"{train} --reward sum")[0] == 0
    assert json.loads(Path("runs/bc/evaluations.jsonl").read_text())["mean"] == 36.0

    compare = "compare runs --episodes 1 --temperature 0,1 --out comparison"
    assert "with --reward sum or mean" in run(f"{compare} {env}")[2]
    assert run(f"{compare} {env} --reward mean")[0] == 0
    assert json.loads(Path("runs/bc-evaluation.json").read_text())["reward"] == "mean"
    assert "The team's reward: mean." in Path("comparison/results.md").read_text()
    assert (
        "none of 1 runs" in run(f"{compare} {env}")[2]
    )  # what was played by a rule is not reused without it

    evaluate = f"evaluate {env} --bundle runs/bc-bundle --episodes 1 --json e.json --report e.html"
    assert run(f"{evaluate} --reward sum")[0] == 0
    assert json.loads(Path("e.json").read_text())["reward"] == "sum"
    assert "Team&#x27;s reward" in Path("e.html").read_text()
    assert "--reward sum: expected --env" in run(f"{compare} --reward sum")[2]
    assert "--reward sum: expected --evaluate-every" in run("train --resume runs/bc --reward sum")[2]


def test_code_that_a_file_names_is_run_only_where_it_is_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, training and exporting do without the environment; evaluations beside training need it."""
    from tests.support import own_simulators

    assert run(RANDOM)[0] == 0
    made: list[int] = []
    original = own_simulators.Reach.__init__

    def counted(self: Any, spoil: Any = None) -> None:
        made.append(1)
        original(self, spoil)

    monkeypatch.setattr(own_simulators.Reach, "__init__", counted)
    small = "--algo bc --steps 100 --behavior-steps 10 --set hidden=8 --set batch_size=8 --snapshot-every 100"
    status, _, err = run(f"train data.hdf5 {small} --out run --evaluate-every 100")
    assert (status, err) == (
        2,
        f"error: the environment is {OWN}:Reach, code that this command did not ask for: add  --env {OWN}:Reach  "
        "to run it\n",
    )
    assert not Path("run").exists()
    assert run("inspect dataset data.hdf5")[0] == 0
    assert run(f"train data.hdf5 {small} --out run")[0] == 0
    assert run("train --resume run")[0] == 0
    assert "add  --env" in run("train --resume run --evaluate-every 100")[2]
    assert "leave --task out" in run("train --resume run --task toy/chain")[2]
    assert "add  --env" in run("compare run --out comparison")[2]
    assert run("export run --out bundle")[0] == 0
    assert run("replay data.hdf5 --bundle bundle --episodes 1")[0] == 0
    assert made == []
    assert run(f"evaluate {OWN}:Reach --bundle bundle --episodes 1")[0] == 0
    assert made
    assert run(f"compare run --out comparison --episodes 1 --env {OWN}:Reach")[0] == 0


def test_trust_is_of_one_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_TRUSTED_REFERENCES", "")
    trust("toy/chain")
    require_trusted("toy/chain")
    trust("arm:make")
    trust("lab:make")
    require_trusted("arm:make")
    require_trusted("lab:make")
    with pytest.raises(
        ConfigError, match="the environment is os:abort, code that this command did not ask for"
    ):
        require_trusted("os:abort")
