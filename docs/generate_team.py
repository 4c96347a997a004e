"""Write the team of ``serve --demo`` and the README's picture: ``python docs/generate_team.py [RESULTS]``.

RESULTS is the folder of ``omcda-deploy results docs/results/demo.toml`` (``make team``). The team is the policy of
SEED at its last step, a rule that knows no returns. Its manifest has the returns of all runs, from which the
picture is drawn; without RESULTS only the picture and the team's README are written again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omcda_deploy import registry
from omcda_deploy.bundle import DEMO_TEAM, MANIFEST, Bundle, read_bundle
from omcda_deploy.experiments.compare import compare_runs, find_runs
from omcda_deploy.experiments.export import export
from omcda_deploy.experiments.results import read_results
from omcda_deploy.export.readme import README, readme
from omcda_deploy.files import write_text
from omcda_deploy.formatting import number, percent
from omcda_deploy.registry import read_dataset
from omcda_deploy.report.comparison import Result
from omcda_deploy.report.figures import Curve, curves_figure
from omcda_deploy.report.html import svg_document
from omcda_deploy.report.svg import line, svg, text

PAGE = Path(__file__).parent / "results" / "demo.toml"
PICTURE = Path(__file__).with_name("team.svg")
ALGORITHM, SEED, PORT = "omcda", 0, 8500
WIDE = "stroke-width:8;stroke-linecap:round"  # of torso and limbs
CARD = """
## Where it comes from

`make team` made it, at commit {commit}: seed {seed} of the {seeds} in `{page}`, after all of its {steps} steps.
That rule was fixed before any of them was played. Settings: {settings},
the others by default.

Returns in {episodes} episodes of evaluation seed 0 per temperature of play, with standard errors; the recorded data
returned {data} on average:

| T | return | stalled | fell |
|---|---|---|---|
{rows}
"""
# A Hopper: its torso, and by agent the place of the joint and where the limb goes on from there.
TORSO = ((78.0, 58.0), (84.0, 120.0))
LIMBS = {
    "agent_0": ((84.0, 120.0), (64.0, 176.0)),
    "agent_1": ((64.0, 176.0), (88.0, 240.0)),
    "agent_2": ((88.0, 240.0), (128.0, 240.0)),
}


def ship(results: Path) -> None:
    """Export the team from the runs of the page, with the returns of all of them in its manifest."""
    [page] = read_results(PAGE).pages
    comparison = compare_runs(find_runs([results]), page.conditions)
    summaries = {summary.variant.algorithm: summary for summary in comparison.summaries}
    [chosen] = [result for result in summaries[ALGORITHM].results if result.seed == SEED]
    shutil.rmtree(DEMO_TEAM, ignore_errors=True)
    export(chosen.run, DEMO_TEAM)
    [dataset] = results.glob("*.hdf5")
    manifest = json.loads((DEMO_TEAM / MANIFEST).read_text())
    manifest["training"]["measured"] = {
        "page": "docs/results/demo.md",
        "temperatures": list(page.temperatures),
        "team": own_returns(chosen),
        "runs": {name: summary.curve.round(3).tolist() for name, summary in summaries.items()},
        "data": round(float(read_dataset(dataset).episode_returns.mean()), 1),
    }
    write_text(DEMO_TEAM / MANIFEST, json.dumps(manifest, indent=1))


def own_returns(result: Result) -> dict[str, Any]:
    """Mean, standard error and shares of stalled and fallen episodes of a run's last policy, by temperature."""
    episodes = max(result.score.snapshots, key=lambda snapshot: snapshot.step).reported
    returns = np.array([table.returns for table in episodes])
    errors = returns.std(axis=1, ddof=1) / np.sqrt(returns.shape[1])
    return {
        "episodes": returns.shape[1],
        "mean": returns.mean(axis=1).round(1).tolist(),
        "standard_error": errors.round(1).tolist(),
        **{name: [table.shares[name] for table in episodes] for name in ("stalled", "fell")},
    }


def card(bundle: Bundle) -> str:
    """The bundle's README, and what its policies returned."""
    training = bundle.manifest["training"]
    measured = training["measured"]
    [page] = read_results(PAGE).pages
    chosen = page.runs[0]["grid"][ALGORITHM]
    team = measured["team"]
    columns = (measured["temperatures"], *(team[n] for n in ("mean", "standard_error", "stalled", "fell")))
    return readme(bundle) + CARD.format(
        seed=SEED,
        seeds=len(measured["runs"][ALGORITHM]),
        page=measured["page"],
        steps=training["steps"],
        commit=training["versions"]["trained"]["git"],
        settings=", ".join(f"`{name}={training['settings'][name]}`" for name in chosen),
        episodes=team["episodes"],
        data=number(measured["data"], 0),
        rows="\n".join(
            f"| {temperature:g} | {number(mean, 0)} ± {number(error, 0)} | {percent(stalled)} | {percent(fell)} |"
            for temperature, mean, error, stalled, fell in zip(*columns, strict=True)
        ),
    )


def picture(bundle: Bundle) -> str:
    """The team, agent by agent, beside the returns of the runs it is from."""
    measured = bundle.manifest["training"]["measured"]
    x = np.array(measured["temperatures"])
    curves = {}
    for name, label in (("omcda", "OMCDA"), ("bc", "behaviour cloning")):
        runs = np.array(measured["runs"][name])
        ends = np.stack([runs.min(axis=0), runs.max(axis=0)], axis=1)
        curves[f"{label}, {len(runs)} seeds"] = Curve(x, runs.mean(axis=0), interval=ends)
    curves["recorded data"] = Curve(x, np.full(x.size, measured["data"]))
    figure = curves_figure(
        curves, "temperature of play", "return", marked=True, apart=3.0, width=490.0, height=230.0
    )
    plot = figure.partition(">")[2].removesuffix("</svg>")
    return svg_document(
        svg(
            900.0,
            330.0,
            "Three agents move one Hopper, each served at a port of its own; returns of OMCDA and of behaviour "
            "cloning over the temperature of play",
            [*team(bundle), f'<g transform="translate(400 10)">{plot}</g>'],
        )
    )


def team(bundle: Bundle) -> Iterator[str]:
    """A hopper of three joints, and beside each who moves it, where it is served, and its share of the budget."""
    (x1, y1), (x2, y2) = TORSO
    yield f'<g class="s8"><path class="stroked" style="{WIDE}" d="M{x1} {y1}L{x2} {y2}"/></g>'
    entries = registry.entries(bundle.spec.task)
    total = sum(budget or 0.0 for budget in bundle.budgets.values())
    for index, (name, ((x1, y1), (x2, y2))) in enumerate(LIMBS.items()):
        yield (
            f'<g class="s{index}"><path class="stroked" style="{WIDE}" d="M{x1} {y1}L{x2} {y2}"/>'
            f'<circle class="filled" cx="{x1}" cy="{y1}" r="9"/></g>'
            f'<text x="{x1}" y="{y1 + 4}" text-anchor="middle" style="fill:var(--page)">{index}</text>'
        )
        joint = entries[name].action[0].of
        yield f'<rect class="filled s{index}" x="170" y="{y1 - 11}" width="5" height="22" rx="2"/>'
        yield text(182.0, y1 - 1, f"{name} · {joint} · :{PORT + index}", kind="name")
        yield text(182.0, y1 + 13, f"{(bundle.budgets[name] or 0.0) / total:.0%} of {total:.2g} nats")
    yield line(20.0, 249.0, 150.0, 249.0, "axis")
    yield text(20.0, 26.0, "one policy server per joint, gRPC", kind="name")


def main(arguments: list[str]) -> None:
    """Write the team where results are given, then its README and the picture."""
    if arguments:
        ship(Path(arguments[0]))
    bundle = read_bundle(DEMO_TEAM)
    write_text(DEMO_TEAM / README, card(bundle))
    write_text(PICTURE, picture(bundle))


if __name__ == "__main__":
    main(sys.argv[1:])
