"""Scores of runs: which policies and episodes they are means over, and how a temperature is selected."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy import cli
from omcda_deploy.client.fallback import BehaviorTeam
from omcda_deploy.commands.compare import compare
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.compare import compare_runs
from omcda_deploy.experiments.export import export
from omcda_deploy.experiments.scores import Conditions, score_clone, score_run, scored_steps
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.play.rollout import episode_seed
from omcda_deploy.registry import team_spec
from omcda_deploy.report.comparison import CLONE, Comparison, summarise
from omcda_deploy.report.comparison_report import terminal_tables, write_comparison
from omcda_deploy.report.scores import Score
from omcda_deploy.training import loop
from omcda_deploy.training.request import TrainRequest
from omcda_deploy.training.run_folder import read_config, snapshot_steps
from tests.experiments.test_compare import episodes_of, result, rows_of, score_of
from tests.support.synthetic import write_dataset

TASK = "mamujoco/hopper-3x1"
CONDITIONS = Conditions(4, 5, 3, (0, 0.5, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of OMCDA whose last policies differ, with its score, and no run of BC beside it."""
    root = tmp_path_factory.mktemp("made")
    run = root / "runs" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(root / "cache"))
        dataset = read(write_dataset(root / "data.hdf5", team_spec(TASK), [40, 20] * 2))
        request = TrainRequest(
            "omcda",
            20,
            settings={"hidden": 8, "batch_size": 8, "mixer_hidden": 4, "lr": 0.03},
            behavior={"steps": 10, "check_every": 10},
            log_every=1,
        )
        loop.train_fleet(dataset, [(request, run)])
        score_run(run, read_config(run), CONDITIONS)
        yield run.parent


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs")) / "run"


# -- which policies, which episodes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (range(1000, 20_001, 1000), [16_000, 17_000, 18_000, 19_000, 20_000]),
        (range(5000, 20_001, 5000), [20_000]),  # as earlier versions kept them
        ([20_000], [20_000]),
        (range(100, 20_001, 100), [19_600, 19_700, 19_800, 19_900, 20_000]),
        ([18_000, 20_000], [18_000, 20_000]),
    ],
)
def test_a_run_is_scored_by_its_last_policies(run: Path, kept: Sequence[int], expected: list[int]) -> None:
    shutil.rmtree(run / "policies")
    (run / "policies").mkdir()
    for step in kept:
        (run / "policies" / f"step-{step:08d}.pt").touch()
    assert scored_steps(run, replace(read_config(run), steps=20_000)) == expected


def test_training_keeps_the_policies_of_a_score(run: Path) -> None:
    assert scored_steps(run, read_config(run)) == snapshot_steps(run)[-5:] == [16, 17, 18, 19, 20]


def test_episodes_that_select_are_never_those_that_are_reported() -> None:
    for conditions in (CONDITIONS, Conditions(), Conditions(200, 3, 200)):
        plans, count = conditions.plans, len(conditions.temperatures)
        seeds = [{episode_seed(plan.seed, k) for k in range(plan.episodes)} for plan in plans]
        assert not set().union(*seeds[:count]) & set().union(*seeds[count:])
        assert [plan.temperature for plan in plans] == [*conditions.temperatures] * 2
        assert [plan.episodes for plan in plans] == [conditions.episodes] * count + [
            math.ceil(conditions.episodes / 4)
        ] * count
        assert str(plans[0].seed) in str(conditions)
        assert str(plans[-1].seed) in str(conditions)


def test_runs_of_several_seeds_do_not_play_the_same_episodes() -> None:
    def seeds(run_seed: int) -> set[int]:
        plans = CONDITIONS.of(run_seed).plans
        return {episode_seed(plan.seed, k) for plan in plans for k in range(plan.episodes)}

    assert CONDITIONS.of(0) == CONDITIONS
    assert len(seeds(10)) == CONDITIONS.episodes + CONDITIONS.selection_episodes
    assert not seeds(10) & seeds(11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "episodes: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"num_envs": 0}, "num_envs: expected at least 1"),
        ({"num_envs": True}, "num_envs: expected at least 1, got True"),
        ({"temperatures": (0, 0.5)}, r"temperatures: expected 0 and 1 among .*, got 0, 0\.5: add them"),
        ({"temperatures": ()}, "temperatures: expected one or more"),
        ({"temperatures": (0, 1, 1)}, "each once"),
        ({"temperatures": (0, 1, math.nan)}, "temperature: expected a number"),
    ],
)
def test_conditions_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Conditions(**settings)


def test_a_score_is_the_mean_over_policies_and_episodes_of_the_exported_graphs(run: Path) -> None:
    """As ``export --step`` and ``evaluate --bundle`` play each of them alone."""
    score = score_run(run, read_config(run), CONDITIONS)  # from the file beside it
    assert [snapshot.step for snapshot in score.snapshots] == [16, 17, 18, 19, 20]
    means = np.zeros((5, 3))
    for k, snapshot in enumerate(score.snapshots):
        team = LocalTeam(export(run, run.with_name(f"b{snapshot.step}"), snapshot.step))
        for index, temperature in enumerate(CONDITIONS.temperatures):
            alone = evaluate(team, TASK, episodes=4, seed=5, num_envs=3, temperature=temperature)
            assert snapshot.reported[index].columns() == alone.columns()
            means[k, index] = alone.mean
    assert score.values == pytest.approx(means.mean(axis=0))
    assert score.returns.mean(axis=2) == pytest.approx(means)
    assert len(set(score.returns.mean(axis=2)[:, 0].tolist())) == 5  # or this would not tell policies apart
    written = json.loads(run.with_name("run-evaluation.json").read_text())
    assert written == score.to_json() == Score.read(written, CONDITIONS.to_json()).to_json()
    assert sorted(path.name for path in run.parent.iterdir() if not path.name.startswith("b")) == [
        *("run", "run-bundle", "run-evaluation.json"),
    ]


def test_a_file_of_another_kind_is_played_again(run: Path) -> None:
    config, few = read_config(run), Conditions(1, temperatures=(0, 1))
    for step in (16, 17, 18, 19):  # one is enough here
        (run / "policies" / f"step-{step:08d}.pt").unlink()
    file = run.with_name("run-evaluation.json")
    first = score_run(run, config, few)
    earlier = {"returns": [1.0], "team": {"bundle_digest": first.bundle_digest}}
    for text in ("[]", json.dumps(earlier), file.read_text()[:-40]):
        file.write_text(text)
        assert score_run(run, config, few).returns.tolist() == first.returns.tolist()
        assert json.loads(file.read_text())["kind"] == "score"


# -- selection --------------------------------------------------------------------------------------------------


def score_at(reported: dict[float, list[float]], selection: dict[float, list[float]]) -> Score:
    """One policy's score with these returns by temperature."""
    score = score_of([0.0])
    [snapshot] = score.snapshots
    played = replace(
        snapshot,
        reported=tuple(episodes_of(values) for values in reported.values()),
        selection=tuple(episodes_of(values, 7) for values in selection.values()),
    )
    return replace(score, temperatures=tuple(reported), snapshots=(played,))


def test_a_temperature_is_selected_without_the_episodes_that_are_reported(tmp_path: Path) -> None:
    """Reported returns are best where the selection is not; two seeds choose together."""
    reported = {0.0: [10.0, 20.0], 0.5: [900.0, 900.0], 1.0: [30.0, 50.0]}
    selection = [{0.0: [0.0], 0.5: [1.0], 1.0: [9.0]}, {0.0: [5.0], 0.5: [4.0], 1.0: [3.0]}]
    results = [replace(result(k, [0.0]), score=score_at(reported, selection[k])) for k in (0, 1)]
    [summary], _ = summarise(results)
    assert summary.selection.tolist() == [2.5, 2.5, 6.0]
    assert summary.temperatures[summary.best] == 1.0
    assert summary.values.tolist() == [40.0, 40.0]
    assert (summary.at(0.0).tolist(), summary.at(1.0).tolist()) == ([15.0, 15.0], [40.0, 40.0])
    # Whatever is reported, the same temperature is selected; equal means select the lowest one.
    for returns in ([-1e9], [0.0], [1e9]):
        other = {temperature: returns for temperature in reported}
        others = [replace(r, score=score_at(other, selection[k])) for k, r in enumerate(results)]
        assert summarise(others)[0][0].best == summary.best
    level = {temperature: [1.0] for temperature in reported}
    [tie], _ = summarise([replace(results[0], score=score_at(reported, level))])
    assert tie.best == 0

    comparison = Comparison([summary], [], {"Evaluation": str(CONDITIONS)})
    write_comparison(comparison, tmp_path)
    [row] = rows_of(tmp_path / "summary.csv")
    assert [row[name] for name in ("temperature", "mean", "t0_mean", "t1_mean", "snapshots")] == [
        *("1.0", "40.0", "15.0", "40.0", "1"),
    ]
    by_temperature = rows_of(tmp_path / "temperatures.csv")
    assert [(r["temperature"], r["mean"], r["selection_mean"], r["selected"]) for r in by_temperature] == [
        ("0.0", "15.0", "2.5", "False"),
        ("0.5", "900.0", "2.5", "False"),
        ("1.0", "40.0", "6.0", "True"),
    ]
    text = (tmp_path / "results.md").read_text()
    assert "| 1 (selected) | 40.000 ± 0.000 |".replace(".000", ".0") in text
    assert "selected by 1 other episodes per policy, of seed 1000005 plus the run's" in text


def test_the_spread_between_policies_is_a_column(tmp_path: Path) -> None:
    score = score_of([0.0])
    [snapshot] = score.snapshots
    means = (10.0, 20.0, 60.0)
    snapshots = tuple(
        replace(
            snapshot,
            step=step,
            reported=(
                episodes_of([mean - 5, mean + 5]),
                episodes_of([mean, mean], fell=np.array([True, False])),
            ),
        )
        for step, mean in enumerate(means)
    )
    one = replace(result(0, [0.0]), score=replace(score, snapshots=snapshots))
    other = replace(result(1, [0.0]), score=score)  # a single policy has no spread
    [summary], _ = summarise([one, other])
    assert summary.snapshots == (1, 3)
    assert summary.std_of_snapshots[0] == pytest.approx(np.std(means))
    assert summary.std_of_episodes[0] == pytest.approx(2.5)
    assert one.score.shares["fell"] is None  # T 0 does not report it
    [alone], _ = summarise([other])
    assert np.isnan(alone.std_of_snapshots).all()
    comparison = Comparison([summary], [], {"Evaluation": "none"})
    write_comparison(comparison, tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    header, row = (
        next(line.split("|") for line in lines if line.startswith(start)) for start in ("|  |", "| omcda")
    )
    cells = {name.strip(): cell.strip() for name, cell in zip(header, row, strict=True)}
    assert cells["snapshots"] == "1\u20133"
    assert cells["std of snapshots"] == f"{np.std(means):.3f}"
    [table] = terminal_tables(comparison)
    assert [str(column.header) for column in table.columns][:8] == [
        *("", "seeds", "snapshots", "selected T", "mean ± std", "T 0", "T 1", "std of snapshots"),
    ]


# -- the clone --------------------------------------------------------------------------------------------------


def test_a_clone_stands_beside_runs_of_other_algorithms(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare_runs([run], CONDITIONS)
    assert [summary.variant.algorithm for summary in comparison.summaries] == [CLONE, "omcda"]
    clone = comparison.summaries[0]
    team = BehaviorTeam(run.with_name("run-bundle"))
    for index, temperature in enumerate(CONDITIONS.temperatures):
        alone = evaluate(team, TASK, episodes=4, seed=5, num_envs=3, temperature=temperature)
        assert clone.curve[0, index] == pytest.approx(alone.mean)
    assert len(set(clone.curve[0].tolist())) == 3
    [table] = terminal_tables(comparison)
    assert str(next(iter(table.columns[0].cells))) == "clone"
    assert [str(cell) for cell in table.columns[1].cells] == ["\u2013", "0"]
    assert [str(cell) for cell in table.columns[2].cells] == ["1", "5"]
    # Again, from the files; nothing is exported or played.
    with monkeypatch.context() as patch:
        patch.setattr("omcda_deploy.play.evaluate.play_plans", None)
        again = compare_runs([run], CONDITIONS)
    assert again.summaries[0].curve.tolist() == clone.curve.tolist()
    assert score_clone(run, read_config(run), CONDITIONS).snapshots[0].step == 0


# -- from the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--temperature 0.5",
            "temperatures: expected 0 and 1 among those of a comparison, got 0.5: add them",
        ),
        ("--temperature 0,1,a", "--temperature: expected numbers such as 0,0.5,1, got '0,1,a'"),
        ("--temperature 0,1,1", "temperatures: expected each once, got 1 twice: leave one out"),
        (
            "--temperature 0,1,nan",
            "temperature: expected a number from 0 (deterministic) over 1 (sampled) to 10",
        ),
        (
            "--temperature 0,1,99",
            "temperature: expected a number from 0 (deterministic) over 1 (sampled) to 10",
        ),
        (
            "--temperature=-1,0,1",
            "temperature: expected a number from 0 (deterministic) over 1 (sampled) to 10",
        ),
    ],
)
def test_wrong_temperatures_are_refused_in_one_line(
    run: Path, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.with_name("out")
    monkeypatch.setattr("sys.argv", ["omcda-deploy", "compare", str(run), "--out", str(out), *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_comparison_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.with_name("out")
    compare([run], out, episodes=4, seed=5, num_envs=3, temperature="1,0.5,0")
    printed = " ".join(capsys.readouterr().out.split())
    assert "seeds snapshots selected T mean ± std T 0 T 1 std of snapshots stalled fell" in printed
    assert {row["use"] for row in rows_of(out / "returns.csv")} == {"reported", "selection"}
    assert {row["snapshot"] for row in rows_of(out / "returns.csv")} == {"0", "16", "17", "18", "19", "20"}
    assert (out / "results-temperatures.svg").read_text().startswith("<svg xmlns=")
