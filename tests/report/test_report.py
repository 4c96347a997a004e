"""Reports of evaluations and replays: valid, self-contained HTML that shows the measured numbers."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from omcda_deploy.errors import ConfigError
from omcda_deploy.files import write_json
from omcda_deploy.play.evaluate import Evaluation
from omcda_deploy.play.measurements import Divergence, Latency, TeamDescription
from omcda_deploy.play.replay import Parity, Replay
from omcda_deploy.report import figures
from omcda_deploy.report.evaluation import (
    Entry,
    comparison_section,
    comparison_table,
    evaluation_section,
    evaluation_table,
)
from omcda_deploy.report.html import Section, svg_document, write_report
from omcda_deploy.report.replay import replay_section, replay_table
from omcda_deploy.report.svg import Scale
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

SPEC = TeamSpec(
    task="stub/<task>",
    agents=tuple(AgentSpec(f"agent_{i}", 3, ActionSpec("continuous", 1)) for i in range(3)),
    state_size=9,
    control_rate=20.0,
)
TEAM = TeamDescription("b0b" * 10, "kl", {"agent_0": 0.125, "agent_1": 0.25, "agent_2": None})
DIVERGENCE = {
    name: Divergence(0.1 * (i + 1), 0.4, np.linspace(0.05, 0.2, 900) * (i + 1), TEAM.budgets[name])
    for i, name in enumerate(SPEC.names)
}
LATENCY = Latency(np.linspace(0.001, 0.101, 101))  # p50 51 ms, p95 96 ms, p99 100 ms
PROVENANCE: dict[str, Any] = {
    "seconds": 12.0,
    "versions": {"python": "3.11.0", "counting": "7"},
    "machine": "a processor, 2 cores",
    "date": "2026-01-02T03:04:05Z",
}
EVALUATION = Evaluation(
    task=SPEC.task,
    spec=SPEC,
    team=TEAM,
    seed=4242,
    temperature=0.0,
    num_envs=2,
    episode_seeds=(11, 12, 13, 14),
    returns=np.array([1000.0, 2000.0, 3000.0, -1234.5]),
    lengths=np.array([1000, 1000, 900, 20]),
    terminated=np.array([False, False, True, True]),
    won=None,
    divergence=DIVERGENCE,
    saturation={"agent_0": 0.25, "agent_1": 0.0, "agent_2": 1.0},
    step_latency=LATENCY,
    agent_latency={name: Latency(np.array([0.00777])) for name in SPEC.names},
    **PROVENANCE,
)
REPLAY = Replay(
    task=SPEC.task,
    spec=SPEC,
    team=TEAM,
    dataset_digest="d1ce" * 8,
    seed=4343,
    temperature=0.0,
    batch=1,
    episodes=(0, 5),
    steps=1500,
    rate=12.5,
    paced=False,
    agreement={"agent_0": 0.1111, "agent_1": 0.2222, "agent_2": 0.3333},
    parity=Parity(0.0, 0.0, 0.0, "b0b" * 10),
    divergence=DIVERGENCE,
    step_latency=LATENCY,
    agent_latency={},
    misses=21,
    **PROVENANCE,
)
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Asserts that every element is closed in order; collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rendered(tmp_path: Path, *sections: Section) -> tuple[str, Checker]:
    path = tmp_path / "report.html"
    write_report(path, "A <title> & more", sections, "summary")
    source = path.read_text(encoding="utf-8")
    return source, Checker(source)


SECTIONS = [
    evaluation_section(EVALUATION),
    evaluation_section(replace(EVALUATION, won=np.array([True, False, True, True]), temperature=1.0)),
    replay_section(REPLAY),
    replay_section(replace(REPLAY, parity=Parity(0.0, 1e-7, 0.5, None), paced=True)),
    replay_section(replace(REPLAY, parity=None)),
    comparison_section({"dataset": np.linspace(0, 100, 1000), "OMCDA <1>": EVALUATION}),
    comparison_section(
        {"<a>": [replace(EVALUATION, temperature=t, fell=np.ones(4, np.bool_)) for t in (0.0, 0.5)]}
    ),
]


def test_well_formed_and_self_contained(tmp_path: Path) -> None:
    source, page = rendered(tmp_path, *SECTIONS)
    assert "://" not in source
    assert not {"script", "link", "img", "iframe", "object", "embed", "use", "image"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}
    assert "url(" not in source
    assert "@import" not in source
    assert "<title> &" not in source  # titles, tasks and row names are escaped
    assert "stub/<task>" not in source
    assert page.tags.count("section") == len(SECTIONS)
    assert page.tags.count("h1") == 1
    assert "prefers-color-scheme:dark" in source


def test_every_coordinate_is_a_number_inside_its_figure(tmp_path: Path) -> None:
    source, _ = rendered(tmp_path, *SECTIONS)
    svgs = re.findall(r'<svg viewBox="0 0 (\S+) (\S+)".*?</svg>', source)
    bodies = re.findall(r"<svg .*?</svg>", source)
    assert len(bodies) > 10
    for (width, height), body in zip(svgs, bodies, strict=True):
        for axis, limit in (("x", float(width)), ("y", float(height))):
            for value in re.findall(rf' c?{axis}[12]?="([^"]*)"', body):
                assert -1 <= float(value) <= limit + 1
        for value in re.findall(r' (?:width|height|r)="([^"]*)"', body):
            assert float(value) >= 0
        assert not re.search(r"\b(nan|inf)\b", body)


def test_a_section_of_an_evaluation_shows_the_measured_numbers(tmp_path: Path) -> None:
    _, page = rendered(tmp_path, evaluation_section(EVALUATION))
    text = " ".join(page.text)
    error = np.std([1000, 2000, 3000, -1234.5], ddof=1) / 2
    assert f"1\u202f191.4 ± {error:.1f}" in text
    for expected in (
        "2 of 4 reached the time limit",
        "51.00 ms",
        "p95 96.00 ms, p99 100.00 ms",
        "4242",
        "b0b" * 10,
    ):
        assert expected in text
    for expected in (
        SPEC.contract_hash,
        "counting 7",
        "2026-01-02T03:04:05Z",
        "a processor, 2 cores",
        "7.77",
    ):
        assert expected in text
    for expected in (
        "0.1250",
        "25.0 %",
        "d = 0.125 nats",
        "deadline 50 ms",
        "\u22121\u202f234.50",
        "KL(π ‖ π_b)",
    ):
        assert expected in text
    assert text.count("d = ") == 2  # agent_2 has no budget


def test_a_section_of_a_replay_shows_the_measured_numbers(tmp_path: Path) -> None:
    _, page = rendered(tmp_path, replay_section(REPLAY))
    text = " ".join(page.text)
    for expected in ("exact", "0.2222", "of 101 steps at 12.5 Hz (80.0 ms), flat out", "d1ce" * 8, "4343"):
        assert expected in text
    _, page = rendered(tmp_path, replay_section(replace(REPLAY, parity=Parity(0.0, 1e-7, 0.5, None))))
    assert "largest difference from the local bundle" in " ".join(page.text)


def cells(table: Table) -> list[list[str]]:
    return [[str(cell) for cell in column.cells] for column in table.columns]


def printed(table: Table) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_for_the_terminal() -> None:
    table = evaluation_table(EVALUATION)
    assert cells(table)[0] == list(SPEC.names)
    assert cells(table)[1] == ["0.1000", "0.2000", "0.3000"]
    assert cells(table)[3] == ["0.1250", "0.2500", "\u2013"]
    assert cells(table)[4] == ["25.0 %", "0.0 %", "100.0 %"]
    assert cells(table)[5] == ["7.77"] * 3
    assert "over 4 episodes" in printed(table)
    untimed = replay_table(REPLAY)  # no times per agent, so no columns for them
    assert [len(column) for column in cells(untimed)] == [3] * 5
    assert cells(untimed)[4] == ["0.1111", "0.2222", "0.3333"]
    assert "parity: exact" in printed(untimed)
    assert "21 of 101 missed 80.0 ms flat out" in printed(untimed)


def test_steps_of_a_fallback_are_named_and_counted(tmp_path: Path) -> None:
    team = replace(TEAM, fallback="hold")
    steps = {"agent_0": 0, "agent_1": 3, "agent_2": 1}
    without_agent_1 = {**DIVERGENCE, "agent_1": Divergence(math.nan, math.nan, np.full(900, math.nan), 0.25)}
    words = "agent_1 in 3, agent_2 in 1 of 101 steps, by hold"
    evaluation = replace(EVALUATION, team=team, fallback_steps=steps, divergence=without_agent_1)
    replayed = replace(
        REPLAY,
        team=team,
        fallback_steps=steps,
        divergence=without_agent_1,
        agreement={"agent_0": 0.1, "agent_1": math.nan, "agent_2": 0.2},
        parity=Parity(math.nan, math.nan, math.nan, "b0b"),
    )
    for table in (evaluation_table(evaluation), replay_table(replayed)):
        assert f"answered by the fallback: {words}" in " ".join(printed(table).split())
        assert cells(table)[1][1] == "\u2013"
    for section in (evaluation_section(evaluation), replay_section(replayed)):
        _, page = rendered(tmp_path, section)
        assert words in " ".join(page.text)
        assert "answered by the fallback" in page.text
    assert "every step was answered by the fallback" in replay_section(replayed).body
    # Reports without missed steps do not mention fallbacks.
    for silent in (replace(evaluation, fallback_steps=dict.fromkeys(steps, 0)), EVALUATION):
        assert "fallback" not in printed(evaluation_table(silent))
        assert "fallback" not in evaluation_section(silent).body


def test_a_joint_graph_has_no_times_of_agents() -> None:
    joint = replace(EVALUATION, agent_latency={"team": LATENCY})
    assert len(evaluation_table(joint).columns) == 5


def test_comparison_of_bare_returns_and_evaluations() -> None:
    table = comparison_table({"dataset": np.array([1.0, 2.0, 3.0]), "one": np.array([7.0]), "BC": EVALUATION})
    columns = cells(table)
    assert columns[0] == ["dataset", "one", "BC"]
    assert columns[1] == ["\u2013", "\u2013", "0"]  # bare returns know no temperature
    assert columns[2] == ["2.0", "7.0", "1\u202f191.4"]
    assert columns[3][:2] == [f"{1 / math.sqrt(3):.1f}", "\u2013"]
    assert columns[4] == ["3", "1", "4"]
    assert columns[5] == ["\u2013", "\u2013", "730"]  # mean length
    assert [column[2] for column in columns[6:]] == ["51.00", "96.00", "100.00"]  # no outcomes are reported
    assert [column[0] for column in columns[6:]] == ["\u2013"] * 3


def test_comparison_of_temperatures(tmp_path: Path) -> None:
    """A row for each temperature of a team, shares where the simulator reports them, and a curve."""
    fell = np.array([True, False, False, False])
    curve = [
        replace(EVALUATION, temperature=0.0, fell=fell),
        replace(EVALUATION, temperature=0.5, fell=~fell),
    ]
    rows: dict[str, Entry] = {"dataset": np.array([1.0, 2.0]), "BC": curve}
    table = comparison_table(rows)
    assert [str(column.header) for column in table.columns] == [
        *("", "T", "mean", "std. error", "episodes", "length", "fell", "p50 ms", "p95 ms", "p99 ms"),
    ]
    columns = cells(table)
    assert columns[0] == ["dataset", "BC", "BC"]
    assert columns[1] == ["\u2013", "0", "0.5"]
    assert columns[6] == ["\u2013", "25.0 %", "75.0 %"]
    _, page = rendered(tmp_path, comparison_section(rows))
    text = " ".join([*page.text, *(value for _, value in page.attributes)])
    for words in ("BC, T 0.5", "return against temperature of play, BC", "whiskers: one standard error"):
        assert words in text
    without = comparison_section({"BC": curve[0]}).body
    assert "temperature of play, BC" not in without


def test_an_evaluation_says_its_temperature_its_shares_and_what_its_error_is(tmp_path: Path) -> None:
    won = np.array([True, False, True, True])
    evaluation = replace(EVALUATION, temperature=0.25, stalled=~won, won=won)
    heading = " ".join(printed(evaluation_table(evaluation)).split())
    error = np.std([1000, 2000, 3000, -1234.5], ddof=1) / 2
    assert (
        f"return 1\u202f191.4 ± {error:.1f} (standard error) over 4 episodes at temperature 0.25, "
        "25.0 % stalled, 75.0 % won"
    ).replace("\u202f", " ") in heading.replace("\u202f", " ")
    _, page = rendered(tmp_path, evaluation_section(evaluation))
    assert {"stalled", "won"} <= set(page.text)
    assert "fell" not in page.text
    assert "0.25" in page.text
    data = evaluation.to_json()
    assert data["temperature"] == 0.25
    assert data["shares"] == {"stalled": 0.25, "fell": None, "won": 0.75}
    assert data["fell"] is None
    assert data["won"] == won.tolist()


@pytest.mark.parametrize(
    "values",
    [
        np.array([5.0]),
        np.array([0.0, 0.0]),
        np.array([-1e9, 1e9]),
        np.array([np.nan, 1.0]),
        np.array([np.nan]),
        np.array([1e-9, 2e-9]),
    ],
)
def test_figures_of_awkward_values(values: NDArray[np.float64]) -> None:
    drawings = [
        figures.returns_figure({"row": values}),
        figures.latency_figure(np.abs(np.nan_to_num(values)), 0.05),
        figures.latency_figure(np.abs(np.nan_to_num(values))),
        figures.bars_figure({"agent": float(values[0])}, "what"),
        *figures.divergence_figures({"agent": values}, {"agent": None}, "what"),
    ]
    for drawing in drawings:
        Checker(drawing)
        assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', drawing)


def test_a_figure_in_a_file_of_its_own() -> None:
    """Curves whose whiskers are intervals, side by side at one x, with their colours in light and dark."""
    x = np.array([0.0, 0.5, 1.0])
    curves = {
        f"method {k} & <co>": figures.Curve(
            x, 10.0 * k + x, interval=np.array([[-1.0, 30.0]] * 2 + [[np.nan] * 2])
        )
        for k in range(12)
    }
    text = svg_document(figures.curves_figure(curves, "temperature", "return", apart=3.0, width=900.0))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in text
    assert "var(--s0)" in text
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    stems = [line for line in root.iter() if line.get("class", "").startswith("stroked") and line.get("y1")]
    upright = [line for line in stems if line.get("x1") == line.get("x2")]
    assert len(upright) == 12 * 2  # nan has no whisker
    assert len({line.get("x1") for line in upright}) == 12 * 2  # none covers another
    width = float(root.get("viewBox", "").split()[2])
    assert all(0 <= float(line.get(end, "")) <= width for line in stems for end in ("x1", "x2"))


def test_axis_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (-517.0, -349.0), (0.0, 0.0031), (1190.0, 1206.0)):
        scale = Scale(low, high, 0.0, 100.0)
        ticks = scale.ticks(6)
        assert 3 <= len(ticks) <= 8
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
        steps = np.diff(ticks)
        assert steps == pytest.approx(steps[0])
        assert float(f"{steps[0]:.6e}".split("e")[0]) in (1.0, 2.0, 5.0)
    assert Scale(0.3, 60.0, 0.0, 100.0, log=True).ticks(6) == pytest.approx([0.5, 1, 2, 5, 10, 20, 50])


def test_writes_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ConfigError, match=r"cannot write .*No space left"):
        write_report(path, "title", SECTIONS)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "before"
    with pytest.raises(ConfigError, match="cannot write"):
        write_json(tmp_path / "absent" / "result.json", EVALUATION.to_json())
    write_json(tmp_path / "result.json", REPLAY.to_json())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["OMCDA & <co>", "b" * 60])
def test_names_in_figures_are_escaped_and_stay_inside(name: str) -> None:
    bar = figures.Bar(1.0, 0.5, np.array([0.5, 1.5]))
    curve = figures.Curve(np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([0.1, math.nan]))
    for drawing in (
        figures.grouped_bars_figure({name: {name: bar}}, name, [name]),
        figures.curves_figure({name: curve}, name, name),
        figures.returns_figure({name: np.array([1.0, 2.0])}, name),
    ):
        assert name in " ".join([*Checker(drawing).text, *(v for _, v in Checker(drawing).attributes)])
