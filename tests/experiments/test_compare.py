"""Comparisons of runs: averages, omissions with their reasons, and files, against hand computation."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy import cli
from omcda_deploy.commands.compare import compare
from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, ExportError
from omcda_deploy.experiments import compare as command
from omcda_deploy.experiments.compare import find_runs
from omcda_deploy.experiments.scores import Conditions, score_run, scored_steps
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.episodes import Episodes
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.plugins import CurveSection, Scan, TrainingCurve
from omcda_deploy.registry import team_spec
from omcda_deploy.report.comparison import Comparison, Curves, Result, Variant, summarise
from omcda_deploy.report.comparison_report import write_comparison
from omcda_deploy.report.figures import Bar, Curve, curves_figure, grouped_bars_figure
from omcda_deploy.report.scores import Score, SnapshotScore
from omcda_deploy.training import loop
from omcda_deploy.training.algorithms import omcda
from omcda_deploy.training.request import TrainRequest
from omcda_deploy.training.run_folder import read_config
from tests.support.synthetic import write_dataset

TASK = "mamujoco/hopper-3x1"
STEPS = 20
SMALL = {"hidden": 8, "batch_size": 8}
FILES = (
    *("returns.csv", "summary.csv", "temperatures.csv", "influence.csv", "d_tot.csv"),
    *(
        "results.md",
        "report.html",
        "results-d_tot.svg",
        "results-influence.svg",
        "results-temperatures-1.svg",
        "results-temperatures-2.svg",
    ),
)


def train(
    dataset: Dataset, out: Path, algorithm: str, seed: int, steps: int = STEPS, **settings: Any
) -> Path:
    """A real run folder. Its dataset is called like the task and its tier, as ``collect`` calls them."""
    request = TrainRequest(
        algorithm,
        steps,
        seed,
        settings={**SMALL, **settings},
        behavior={"steps": 10, "check_every": 10},
        log_every=5,
        checkpoint_every=STEPS // 2,
        snapshot_every=STEPS // 2,
    )
    loop.train_fleet(dataset, [(request, out)], dataset_path="data/mamujoco-hopper-3x1-medium.hdf5")
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of two algorithms, three budgets and two datasets of one name, as sweeps lay them out."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(root / "cache"))
        one, other = (
            read(write_dataset(root / f"{k}.hdf5", team_spec(TASK), [40, 20] * 2, seed=k)) for k in range(2)
        )
        runs = root / "runs"
        for seed in (0, 1, 2):
            train(one, runs / "bc" / f"seed{seed}", "bc", seed)
        train(one, runs / "omcda" / "seed0", "omcda", 0, mixer_hidden=4)
        train(one, runs / "omcda-d_tot=1.2" / "seed0", "omcda", 0, mixer_hidden=4, d_tot=1.2)
        train(other, runs / "other" / "seed0", "bc", 0)
        yield runs


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


RETURNS = {0: [10.0, 30.0], 1: [40.0, 60.0], 2: [70.0, 130.0]}  # by seed: means 20, 50, 100


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulators stand still: two episodes per run, chosen by its seed. Yields the runs that were played."""
    names: list[str] = []

    def played_score(folder: Path, config: Any, *_: Any) -> Score:
        steps = scored_steps(folder, config)
        names.append(f"{folder.parent.name}/{folder.name} at {', '.join(map(str, steps))}")
        return score_of(RETURNS[config.seed])

    monkeypatch.setattr(command, "score_run", played_score)
    monkeypatch.setattr(command, "score_clone", lambda *_: score_of([15.0]))
    return names


def episodes_of(returns: Sequence[float], first_seed: int = 100, **outcomes: Any) -> Episodes:
    return Episodes(
        episode_seeds=tuple(range(first_seed, first_seed + len(returns))),
        returns=np.array(returns),
        lengths=np.full(len(returns), 7),
        terminated=np.ones(len(returns), np.bool_),
        **outcomes,
    )


def score_of(returns: Sequence[float], sampled: Sequence[float] | None = None) -> Score:
    """One policy's score at T 0 and T 1; the returns of T 1 are those of T 0 unless they are given."""
    tables = (episodes_of(returns), episodes_of(returns if sampled is None else sampled))
    selection = tuple(replace(table, episode_seeds=(7,) * len(returns)) for table in tables)
    return Score(
        (0.0, 1.0),
        (SnapshotScore(STEPS, "sha", tables, selection),),
        Conditions(len(returns), temperatures=(0, 1)).to_json(),
        "digest",
        {"numpy": "2"},
        "a processor, 2 cores",
        "2026-01-02T03:04:05Z",
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -- which runs -----------------------------------------------------------------------------------------------


def test_runs_are_found_once_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a/seed1", "a/seed0", "b", "b/inner", ".hidden/seed0", "a/.seed2.x/seed2"):
        (tmp_path / name / "policies").mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "behavior").mkdir()
    (tmp_path / "behavior" / "config.json").touch()  # another kind of training
    expected = [tmp_path / name for name in ("a/seed0", "a/seed1", "b")]
    assert find_runs([tmp_path]) == expected
    assert find_runs([tmp_path / "b", tmp_path, tmp_path / "a" / ".." / "b"]) == [expected[2], *expected[:2]]
    with pytest.raises(ConfigError, match="none is not a folder: expected a run folder"):
        find_runs([tmp_path / "none"])
    with pytest.raises(
        ConfigError, match=r"no run folder in .*behavior: expected .*config\.json beside policies"
    ):
        find_runs([tmp_path, tmp_path / "behavior"])


def test_runs_are_averaged_by_dataset_algorithm_and_settings(
    runs: Path, tmp_path: Path, played: list[str]
) -> None:
    compare([runs], tmp_path / "out")
    assert len(played) == 6
    assert all(name.endswith(f" at {STEPS}") for name in played)  # the last policy of several
    rows = rows_of(tmp_path / "out" / "summary.csv")
    one, other = (read_config(runs / name / "seed0").dataset_digest for name in ("bc", "other"))
    assert one != other
    small = "batch_size 8, hidden 8"
    cloned = "behavior.steps 10, behavior.check_every 10"
    assert {
        (row["dataset_digest"], row["algorithm"], row["settings"], row["runs"], row["mean"], row["std"])
        for row in rows
        if row["task"] == TASK
    } == {
        (one, "bc", f"{small}, {cloned}", "3", str(170 / 3), str(float(np.std([20, 50, 100])))),
        (other, "bc", f"{small}, {cloned}", "1", "20.0", ""),
        (one, "omcda", f"{small}, mixer_hidden 4, {cloned}", "1", "20.0", ""),
        (one, "omcda", f"d_tot 1.2, {small}, mixer_hidden 4, {cloned}", "1", "20.0", ""),
    }

    [overall] = [row for row in rows if row["task"] == "*"]  # bc alone is on two datasets
    assert (overall["datasets"], overall["runs"], overall["mean"]) == ("2", "4", "")
    scores = 100 * (np.array([20, 50, 100, 20]) - 19.1) / (2452.02 - 19.1)
    assert float(overall["score_iqm"]) == pytest.approx(np.sort(scores)[1:3].mean())
    assert overall["score_iqm_low"] == ""  # one of the datasets has one seed
    [first] = [row for row in rows if row["runs"] == "3"]
    assert float(first["iqm"]) == pytest.approx(170 / 3)
    assert 20 <= float(first["iqm_low"]) < float(first["iqm"]) < float(first["iqm_high"]) <= 100
    assert float(first["score_mean"]) == pytest.approx(scores[:3].mean())


def test_what_is_written(runs: Path, tmp_path: Path, played: list[str]) -> None:
    out = tmp_path / "deep" / "out"
    compare([runs], out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    returns = rows_of(out / "returns.csv")
    assert len(returns) == 6 * 2 * 2 * 2  # runs, temperatures, uses, episodes
    returns = [row for row in returns if (row["use"], row["temperature"]) == ("reported", "0.0")]
    assert len(returns) == 12
    [row] = [row for row in returns if row["run"].endswith("bc/seed2") and row["episode"] == "1"]
    assert (row["return"], row["episode_seed"], row["length"], row["ended_by"]) == (
        *("130.0", "101", "7", "terminal"),
    )
    assert (row["task"], row["dataset"], row["seed"], row["steps"]) == (TASK, "medium", "2", str(STEPS))
    assert row["commit"] == read_config(runs / "bc" / "seed2").versions["git"]

    lines = [
        json.loads(line) for line in (runs / "omcda" / "seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    d_tot = read_config(runs / "omcda" / "seed0").settings["d_tot"]
    influence = [row for row in rows_of(out / "influence.csv") if "d_tot 1.2" not in row["settings"]]
    assert len(influence) == 4 * 3  # logged steps, agents
    for row in influence:
        line = next(line for line in lines if line["step"] == int(row["step"]))
        agent = row["agent"]
        for name in ("influence", "budget", "kl"):
            assert float(row[name]) == line[f"{name}/{agent}"]
        assert float(row["share"]) == pytest.approx(line[f"budget/{agent}"] / d_tot, rel=1e-5)

    scan = rows_of(out / "d_tot.csv")
    assert sorted((row["d_tot"], row["mean"], row["std"]) for row in scan) == [
        (f"{d_tot:g}", "20.0", ""),
        ("1.2", "20.0", ""),
    ]
    assert len({row["allocation"] for row in scan}) == 1
    assert scan[0]["allocation"].startswith("optimal, ")

    digests = [read_config(runs / name / "seed0").dataset_digest for name in ("bc", "other")]
    for text in ((out / "results.md").read_text(), (out / "report.html").read_text()):
        for digest in digests:
            assert digest in text
            assert f"medium ({digest[:8]})" in text  # two datasets of one name
        assert "a processor, 2 cores" in text
        assert read_config(runs / "bc" / "seed0").versions["git"] in text
        assert "one seed: none" in text
    figures = figures_of(out / "report.html")
    assert (
        len(figures) == 1 + 2 + 1 + 2 * 4
    )  # returns, temperatures of two datasets, the scan, influence of two
    assert "http" not in (out / "report.html").read_text().replace("http://www.w3.org", "")


def figures_of(report: Path) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", report.read_text(), re.DOTALL)
    ]


def edit(run: Path, **changes: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_is_left_out_is_named(
    runs: Path,
    tmp_path: Path,
    played: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An unfinished run, one that failed, one damaged, and one twice: none of them in a mean, all listed."""
    edit(runs / "bc" / "seed2", steps=4000)
    shutil.copytree(runs / "bc" / "seed1", runs / "copy" / "seed1")
    (runs / "other" / "seed0" / "config.json").write_text("{")
    original = vars(command)["score_run"]  # of the fixture

    def failing(folder: Path, *rest: Any) -> Score:
        if folder.parent.name == "omcda":
            raise ExportError("no parity")
        score: Score = original(folder, *rest)
        return score

    monkeypatch.setattr(command, "score_run", failing)
    out = tmp_path / "out"
    compare([runs], out)
    [row] = [row for row in rows_of(out / "summary.csv") if row["algorithm"] == "bc"]
    assert (row["runs"], row["mean"]) == ("2", "35.0")
    assert not any("seed2" in name for name in played)
    printed = " ".join(capsys.readouterr().out.split())
    for text in (printed, (out / "results.md").read_text(), (out / "report.html").read_text()):
        assert "unfinished: its last policy is of step 20 of 4,000" in text
        assert "failed: no parity" in text
        assert re.search(r"failed: .*other/seed0/config\.json is damaged", text)
        assert re.search(r"repeats .*bc/seed1: the same dataset, settings, steps and seed", text)


def test_other_steps_and_other_ways_of_training_are_other_variants(
    runs: Path, tmp_path: Path, played: list[str]
) -> None:
    edit(runs / "bc" / "seed1", time_limit_is_terminal=True)
    edit(runs / "bc" / "seed2", steps=STEPS // 2)
    compare([runs / "bc"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "summary.csv")
    assert sorted((row["steps"], row["mean"], "time_limit" in row["settings"]) for row in rows) == [
        ("10", "100.0", False),
        ("20", "20.0", False),
        ("20", "50.0", True),
    ]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "behavior.check_every 10, 10 steps" in text  # bars that differ in nothing else
    assert "behavior.check_every 10, 20 steps" in text


@pytest.mark.parametrize(("seed", "shown"), [(2, False), (0, True), (7, True)])
def test_a_clone_of_another_seed_than_the_runs_is_another_variant(
    runs: Path, tmp_path: Path, played: list[str], seed: int, shown: bool
) -> None:
    run = runs / "bc" / "seed2"
    edit(run, behavior={**read_config(run).behavior, "seed": seed})
    compare([runs / "bc"], tmp_path / "out")
    settings = [row["settings"] for row in rows_of(tmp_path / "out" / "summary.csv")]
    assert len(settings) == 1 + shown
    assert any(f"behavior.seed {seed}" in text for text in settings) == shown


def test_a_dataset_is_known_by_its_digest_whatever_its_file_is_called(
    runs: Path, tmp_path: Path, played: list[str]
) -> None:
    edit(runs / "bc" / "seed2", dataset="elsewhere/another-name.hdf5")
    compare([runs / "bc"], tmp_path / "out")
    [row] = rows_of(tmp_path / "out" / "summary.csv")
    assert row["runs"] == "3"


def test_nothing_to_compare_is_an_error(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(runs / "omcda" / "seed0", steps=4000)
    with pytest.raises(
        ConfigError, match=r"none of 1 runs can be compared; .*seed0 is unfinished: .* 20 of 4,000"
    ):
        compare([runs / "omcda"], tmp_path / "out")
    with pytest.raises(ConfigError, match="episodes: expected at least 1, got 0"):
        compare([runs], tmp_path / "out", episodes=0)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file: expected a folder"):
        compare([runs], tmp_path / "file")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["omcda-deploy", "compare", str(tmp_path / "none"), "--out", "x"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


# -- exported and played ----------------------------------------------------------------------------------------


def test_each_run_is_exported_and_played_once(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the simulator: as ``evaluate --bundle``; then from the files beside the run, while they are of it."""
    run = runs / "bc" / "seed2"
    settings: dict[str, Any] = {"episodes": 3, "seed": 5, "num_envs": 2, "temperature": "0,0.5,1"}
    compare([run], tmp_path / "first", **settings)
    bundle, measured = run.with_name("seed2-bundle"), run.with_name("seed2-evaluation.json")
    rows = rows_of(tmp_path / "first" / "returns.csv")
    for use, seed, episodes in (("reported", 7, 3), ("selection", 1_000_007, 1)):
        for temperature in (0.0, 0.5, 1.0):
            expected = evaluate(
                LocalTeam(bundle), TASK, episodes=episodes, seed=seed, num_envs=2, temperature=temperature
            )
            own = [row for row in rows if (row["use"], float(row["temperature"])) == (use, temperature)]
            assert [float(row["return"]) for row in own] == expected.returns.tolist()
            assert [int(row["episode_seed"]) for row in own] == list(expected.episode_seeds)
            assert [row["fell"] for row in own] == [str(fell) for fell in expected.columns()["fell"]]
    assert LocalTeam(bundle).bundle.manifest["training"]["step"] == STEPS

    with monkeypatch.context() as patch:
        patch.setattr("omcda_deploy.experiments.export.export", _never)
        patch.setattr("omcda_deploy.play.evaluate.play_plans", _never)
        compare([runs / "bc" / ".." / "bc" / "seed2"], tmp_path / "again", **settings)
        assert rows_of(tmp_path / "again" / "summary.csv") == rows_of(tmp_path / "first" / "summary.csv")
        for other in ({"episodes": 4}, {"seed": 6}, {"num_envs": 3}, {"temperature": "0,1"}):
            with pytest.raises(AssertionError, match="again"):
                compare([run], tmp_path / "again", **{**settings, **other})

    # Another policy in the same place: what was made of the old one is replaced.
    digest = LocalTeam(bundle).bundle.digest
    policy = f"policies/step-{STEPS:08d}.pt"
    shutil.copy(runs / "bc" / "seed1" / policy, run / policy)
    conditions = Conditions(3, 5, 2, (0, 1))
    score_run(run, read_config(run), conditions)
    assert LocalTeam(bundle).bundle.digest != digest
    assert json.loads(measured.read_text())["team"]["bundle_digest"] == LocalTeam(bundle).bundle.digest
    assert sorted(path.name for path in run.parent.iterdir() if "seed2" in path.name) == [
        *("seed2", "seed2-bundle", "seed2-evaluation.json"),
    ]

    # A bundle that was not made here is not touched.
    theirs = runs / "bc" / "seed1-bundle"
    shutil.copytree(bundle, theirs)
    shutil.copy(runs / "bc" / "seed0" / policy, runs / "bc" / "seed1" / policy)
    with pytest.raises(
        ConfigError, match="seed1-bundle is not what step 20 of seed1 exports to: move it away"
    ):
        score_run(runs / "bc" / "seed1", read_config(runs / "bc" / "seed1"), conditions)
    assert LocalTeam(theirs).bundle.digest == LocalTeam(bundle).bundle.digest


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("exported or played again")


# -- what metrics say -----------------------------------------------------------------------------------------

AGENTS = ("agent_0", "agent_1")


def lines_of(count: int, extra: Mapping[str, Sequence[float]] | None = None) -> list[dict[str, float]]:
    """Influence k and -k, budgets 1 and 3, KL 0.5 and 2 at line k."""
    lines = []
    for k in range(count):
        values = {"influence": (k, -k), "budget": (1, 3), "kl": (0.5, 2.0), **(extra or {})}
        line = {f"{name}/{agent}": own[i] for name, own in values.items() for i, agent in enumerate(AGENTS)}
        lines.append({"step": 10 * (k + 1), **line})
    return lines


def test_contributions_are_measured_or_estimated() -> None:
    estimated = Curves.of(omcda.CURVES, AGENTS, lines_of(3))
    assert estimated is not None
    assert estimated.steps.tolist() == [10, 20, 30]
    assert estimated.values["contribution"].tolist() == [[0, 0], [0.5, -2], [1, -4]]  # m KL
    assert estimated.estimated == {"contribution"}
    assert estimated.values["share"].tolist() == [[0.25, 0.75]] * 3
    measured = Curves.of(omcda.CURVES, AGENTS, lines_of(3, {"value/reward": (8, 9)}))
    assert measured is not None
    assert measured.values["contribution"].tolist() == [[8, 9]] * 3
    assert measured.estimated == set()
    assert Curves.of(omcda.CURVES, AGENTS, [{"step": 10, "loss/policy": 1.0}]) is None
    # Long runs are averaged in groups, each shown at its last step.
    long = Curves.of(omcda.CURVES, AGENTS, lines_of(250))
    assert long is not None
    assert len(long.steps) == 100
    assert long.steps[-1] == 2500
    assert long.values["influence"][0, 0] == 1.0  # lines 0, 1 and 2
    assert long.steps[0] == 30


def result(seed: int, returns: Sequence[float], **changes: Any) -> Result:
    variant = replace(Variant(TASK, "medium", "d" * 64, "omcda", (), 100), **changes)
    settings = {"d_tot": 0.3, "allocation": "influence", **dict(variant.settings)}
    return Result(
        variant,
        f"runs/{seed}",
        seed,
        settings,
        {"git": "c0ffee"},
        score_of(returns),
        Curves.of(omcda.CURVES, AGENTS, lines_of(4)),
        omcda.SCAN,
        90.0,
    )


def test_a_scan_has_a_line_per_allocation_and_everything_else(tmp_path: Path) -> None:
    results = [
        result(seed, [mean + 10 * seed], settings=settings)
        for seed in (0, 1)
        for mean, settings in (
            (100.0, ()),
            (200.0, (("d_tot", 1.2),)),
            (50.0, (("allocation", "uniform"),)),
            (70.0, (("d_tot", 1.2), ("allocation", "uniform"))),
            (60.0, (("d_tot", 1.2), ("decoupled", False))),
        )
    ]
    summaries, repeated = summarise(results)
    assert repeated == []
    write_comparison(Comparison(summaries, [], {"Evaluation": "one episode"}), tmp_path)
    rows = {(row["allocation"], row["d_tot"]): row for row in rows_of(tmp_path / "d_tot.csv")}
    assert {key: row["mean"] for key, row in rows.items()} == {
        ("influence", "0.3"): "105.0",
        ("influence", "1.2"): "205.0",
        ("uniform", "0.3"): "55.0",
        ("uniform", "1.2"): "75.0",
        ("influence, decoupled False", "1.2"): "65.0",
    }
    assert rows["uniform", "1.2"]["std"] == "5.0"
    [scan] = [
        svg for svg in figures_of(tmp_path / "report.html") if "against d_tot" in svg.get("aria-label", "")
    ]
    ticks = [text.text for text in scan.iter("text") if text.get("class") == "tick"]
    assert {"0.3", "1.2"} <= set(ticks)
    assert len([path for path in scan.iter("path")]) == 2  # decoupled has one budget: a point, no line


def test_another_algorithms_curves_and_scan_are_shown(
    runs: Path, tmp_path: Path, played: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BC with declarations of its own stands for an algorithm that the reports know nothing about."""
    from omcda_deploy.training.algorithms import bc

    monkeypatch.setattr(
        bc,
        "CURVES",
        CurveSection("Imitation", "imitation.csv", (TrainingCurve("gap", "kl", "gap in nats"),)),
        False,
    )
    monkeypatch.setattr(bc, "SCAN", Scan("lr", "grad_clip", "Rates", "lr, log", "the rate"), False)
    edit(runs / "bc" / "seed1", settings={**read_config(runs / "bc" / "seed1").settings, "lr": 0.001})
    out = tmp_path / "out"
    compare([runs / "bc"], out)
    rows = rows_of(out / "imitation.csv")
    logged = [json.loads(line) for line in (runs / "bc" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    agents = read_config(runs / "bc" / "seed0").spec.names
    assert [float(row["gap"]) for row in rows if row["seed"] == "0"] == [
        line[f"kl/{agent}"] for line in logged for agent in agents
    ]
    assert sorted((row["lr"], row["mean"]) for row in rows_of(out / "lr.csv")) == [
        ("0.0005", "60.0"),
        ("0.001", "50.0"),
    ]
    text = (out / "report.html").read_text()
    for words in ("Imitation: bc", "gap in nats", "Rates of bc on", "against the rate; 20 steps"):
        assert words in text
    assert not (out / "influence.csv").exists()
    assert not (out / "d_tot.csv").exists()


# -- figures ----------------------------------------------------------------------------------------------------


def test_bars_stand_for_their_means() -> None:
    values = np.array([1.0, 3.0])
    groups = {
        "medium": {"a": Bar(2.0, 1.0, values), "<b>": Bar(-1.0, float("nan"), np.array([-1.0]))},
        "expert": {"a": Bar(4.0, 0.0, np.array([4.0]))},
    }
    svg = ElementTree.fromstring(grouped_bars_figure(groups, "return", ["z", "a", "<b>"]))
    bars = [rect for rect in svg.iter("rect") if rect.find("title") is not None]
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[0] / heights[1] == pytest.approx(2.0, rel=0.01)
    assert heights[2] / heights[0] == pytest.approx(2.0, rel=0.01)
    zero = float(bars[0].get("y", "")) + heights[0]
    assert float(bars[1].get("y", "")) == pytest.approx(zero, abs=0.2)  # the negative one hangs from zero
    assert [bar.findtext("title") for bar in bars] == [
        *("medium, a: 2 ± 1", "medium, <b>: \u22121", "expert, a: 4 ± 0"),
    ]
    assert [bar.get("class") for bar in bars] == ["filled s1", "filled s2", "filled s1"]
    dots = sorted(float(dot.get("cy", "")) for dot in svg.iter("circle") if dot.get("class") == "run")
    unit = heights[0] / 2
    assert dots == pytest.approx([zero - unit * value for value in (4, 3, 1, -1)], abs=0.3)
    stems = [
        line for line in svg.iter("line") if line.get("class") == "error" and line.get("x1") == line.get("x2")
    ]
    ends = [float(stems[0].get(name, "")) for name in ("y1", "y2")]
    assert ends == pytest.approx([zero - unit, zero - 3 * unit], abs=0.3)
    assert len(stems) == 2  # one bar has no spread


def test_curves_leave_out_what_is_not_finite() -> None:
    curve = Curve(np.array([1.0, 2.0, 3.0]), np.array([0.0, np.nan, 1.0]), np.array([0.1, np.nan, np.nan]))
    svg = ElementTree.fromstring(curves_figure({"a & b": curve}, "step", "m"))
    [path] = list(svg.iter("path"))
    assert path.get("d", "").count("L") == 1
    assert len(list(svg.iter("circle"))) == 2
    assert len([line for line in svg.iter("line") if line.get("class") == "stroked s0"]) == 3  # one whisker
    single = ElementTree.fromstring(curves_figure({"a": Curve(np.ones(1), np.ones(1))}, "step", "m"))
    assert len(list(single.iter("circle"))) == 1
