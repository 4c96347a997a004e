"""Replays for people: a section of a report and a table for the terminal."""

from __future__ import annotations

import math

import numpy as np
from rich.table import Table

from omcda_deploy.formatting import UNKNOWN, count, number
from omcda_deploy.play.replay import Replay, agreement_measure
from omcda_deploy.report.figures import bars_figure
from omcda_deploy.report.html import Section, captioned, html_table, provenance_list, tiles
from omcda_deploy.report.measurements import (
    agent_section,
    agent_table,
    divergence_name,
    divergence_parts,
    fallback_line,
    fallback_tiles,
    latency_histogram,
    latency_tile,
    latency_words,
    origin,
    temperature_words,
    version_line,
)


def replay_section(replay: Replay, heading: str = "Replay") -> Section:
    """Agreement with the recorded actions, parity with the local bundle, deadlines, and where it came from."""
    measure = agreement_measure(replay.spec).replace("_recorded", " recorded").replace(" - ", " \u2212 ")
    parts = [
        tiles(_tiles(replay, measure)),
        captioned(bars_figure(replay.agreement, measure), "Agreement with the recorded actions."),
        agent_section(replay, measure, _agreement(replay)),
        _parity_table(replay),
        *divergence_parts(replay.divergence, divergence_name(replay.team)),
        latency_histogram(
            replay.step_latency,
            f"One answer of the whole team for {count(replay.batch, 'episode')}.",
            1 / replay.rate,
        ),
        provenance_list(
            {
                "Task": replay.task,
                "Dataset": replay.dataset_digest,
                "Episodes": f"{len(replay.episodes)}, {number(replay.steps, 0)} joint actions",
                "Temperature": temperature_words(replay.temperature),
                "Seed": str(replay.seed),
                "Wall clock": f"{number(replay.seconds, 1)} s",
                **origin(replay),
            }
        ),
    ]
    return Section(heading, "".join(parts))


def replay_table(replay: Replay) -> Table:
    """Per agent: divergence, agreement, latency; parity and deadlines in the heading."""
    parity, detail = _parity_words(replay)
    return agent_table(
        replay,
        f"{replay.task}: {count(len(replay.episodes), 'episode')}, {number(replay.steps, 0)} joint actions\n"
        f"parity: {parity}{'' if parity == 'exact' else ', ' + detail}\n"
        f"one answer of the team: {latency_words(replay.step_latency)}; {replay.misses} of "
        f"{replay.step_latency.seconds.size} missed {1e3 / replay.rate:.1f} ms {_pace(replay)}"
        f"{fallback_line(replay)}{version_line(replay)}",
        "|a-a_rec|" if replay.spec.action_kind == "continuous" else "equal",
        _agreement(replay),
    )


def _tiles(replay: Replay, measure: str) -> list[tuple[str, str, str]]:
    agreement = float(np.mean(list(replay.agreement.values())))
    return [
        ("agreement", number(agreement, 4), measure + ", mean over agents"),
        ("parity", *_parity_words(replay)),
        latency_tile(replay.step_latency),
        (
            "deadline misses",
            number(replay.misses, 0),
            f"of {number(replay.step_latency.seconds.size, 0)} steps at {replay.rate:g} Hz "
            f"({number(1e3 / replay.rate, 1)} ms), {_pace(replay)}",
        ),
        *fallback_tiles(replay),
    ]


def _pace(replay: Replay) -> str:
    return "in real time" if replay.paced else "flat out"


def _agreement(replay: Replay) -> dict[str, str]:
    return {name: number(value, 4) for name, value in replay.agreement.items()}


def _parity_words(replay: Replay) -> tuple[str, str]:
    parity = replay.parity
    if parity is None:
        return UNKNOWN, "nothing to compare with: give --bundle beside --endpoints"
    if parity.exact:
        return "exact", "equal to the local bundle to the last digit"
    worst = max(parity.action, parity.divergence, parity.parameters)
    if math.isnan(worst):
        return UNKNOWN, "every step was answered by the fallback"
    return f"{worst:.2g}", "largest difference from the local bundle"


def _parity_table(replay: Replay) -> str:
    parity = replay.parity
    if parity is None:
        return ""
    rows = [
        [output, "0" if value == 0 else f"{value:.3g}"]
        for output, value in (
            ("action", parity.action),
            ("divergence, nats", parity.divergence),
            ("distribution parameters", parity.parameters),
        )
    ]
    return captioned(
        html_table(["output", "largest |difference|"], rows),
        f"Parity with the local bundle {(parity.local_digest or '')[:16]}, asked with the same batches.",
    )
