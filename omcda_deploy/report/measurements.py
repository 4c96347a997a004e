"""Parts that reports of evaluations and of replays share: latency, divergence, fallbacks and provenance.

For the values of :mod:`omcda_deploy.play.measurements`; each has a form for HTML and one for tables of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from omcda_deploy.formatting import UNKNOWN, count, number
from omcda_deploy.play.evaluate import Evaluation
from omcda_deploy.play.measurements import Divergence, Latency, TeamDescription
from omcda_deploy.play.replay import Replay
from omcda_deploy.report.figures import bars_figure, divergence_figures, latency_figure
from omcda_deploy.report.html import captioned, html_table
from omcda_deploy.report.terminal import terminal_table

_PERCENTILES = (50, 95, 99)
_LATENCY_COLUMNS = ("p50 ms", "p95 ms", "p99 ms")
_DIVERGENCE_NAMES = {"kl": "KL(π ‖ π_b)", "neg_log_behavior": "\u2212log π_b(a | o)"}

# -- latency ----------------------------------------------------------------------------------------------------


def _milliseconds(latency: Latency, q: float) -> str:
    """The q-th percentile in ms."""
    return number(latency.percentile(q), 2)


def latency_words(latency: Latency) -> str:
    """Median, p95 and p99 as part of a sentence."""
    return ", ".join(f"p{q} {_milliseconds(latency, q)} ms" for q in _PERCENTILES)


def latency_cells(latency: Latency | None) -> list[str]:
    """Median, p95 and p99 in ms as cells of a table."""
    return [UNKNOWN if latency is None else _milliseconds(latency, q) for q in _PERCENTILES]


def latency_tile(latency: Latency) -> tuple[str, str, str]:
    """A tile with the median, and p95 and p99 as its detail."""
    p50, p95, p99 = (_milliseconds(latency, q) for q in _PERCENTILES)
    return "latency p50", f"{p50} ms", f"p95 {p95} ms, p99 {p99} ms, whole team"


def latency_histogram(latency: Latency, caption: str, deadline: float) -> str:
    """A captioned histogram with the ``deadline`` (s) marked."""
    return captioned(latency_figure(latency.seconds, deadline), caption)


def _timed_agents(agents: Iterable[str], latency: Mapping[str, Latency]) -> bool:
    """True where agents were timed one by one; a joint graph is timed as a whole, as the step's latency."""
    return any(name in latency for name in agents)


# -- divergence ---------------------------------------------------------------------------------------------------


def divergence_name(team: TeamDescription) -> str:
    """The quantity that the team's bundle reports as divergence, as a formula where it is known."""
    return _DIVERGENCE_NAMES.get(team.divergence_kind or "", "divergence")


def _divergence_cells(divergence: Divergence) -> list[str]:
    """Mean, p99 and budget in nats as cells of a table."""
    return [number(value, 4) for value in (divergence.mean, divergence.p99, divergence.budget)]


def divergence_parts(divergence: Mapping[str, Divergence], quantity: str) -> list[str]:
    """Captioned figures: mean divergence per agent beside its budget, and divergence over the episode."""
    budgets = {name: value.budget for name, value in divergence.items()}
    limit = "" if all(value is None for value in budgets.values()) else "; the mark is the budget d"
    means = {name: value.mean for name, value in divergence.items()}
    panels = divergence_figures({n: v.by_step for n, v in divergence.items()}, budgets, quantity)
    return [
        captioned(
            bars_figure(means, f"mean {quantity}, nats", budgets),
            f"Divergence from the behavior policy per agent{limit}.",
        ),
        captioned(
            f'<div class="panels">{"".join(panels)}</div>',
            f"{quantity} over the episode, mean over the episodes still running at each step.",
        ),
    ]


# -- agents -------------------------------------------------------------------------------------------------------


def _agent_rows(result: Evaluation | Replay, column: Mapping[str, str]) -> list[list[str]]:
    """One row per agent: name, divergence, its cell of ``column``, and latency where agents were timed."""
    timed = _timed_agents(result.divergence, result.agent_latency)
    return [
        [
            name,
            *_divergence_cells(divergence),
            column[name],
            *(latency_cells(result.agent_latency.get(name)) if timed else ()),
        ]
        for name, divergence in result.divergence.items()
    ]


def agent_section(result: Evaluation | Replay, title: str, column: Mapping[str, str]) -> str:
    """Captioned table of HTML with one row per agent; ``title`` is that of ``column``."""
    quantity = divergence_name(result.team)
    header = ["agent", f"{quantity}, nats", "p99, nats", "budget d, nats", title]
    if _timed_agents(result.divergence, result.agent_latency):
        header += ["p50, ms", "p95, ms", "p99, ms"]
    return captioned(
        html_table(header, _agent_rows(result, column)),
        f"Per agent: {quantity} averaged over all steps, and its 99th percentile.",
    )


def agent_table(result: Evaluation | Replay, heading: str, title: str, column: Mapping[str, str]) -> Table:
    """Table for the terminal with one row per agent, under a ``heading``; ``title`` is that of ``column``."""
    timed = _timed_agents(result.divergence, result.agent_latency)
    columns = ("divergence", "p99", "budget", title, *(_LATENCY_COLUMNS if timed else ()))
    table = terminal_table(heading, "agent", columns)
    for row in _agent_rows(result, column):
        table.add_row(*row)
    return table


# -- fallbacks and provenance -------------------------------------------------------------------------------------


def _fallback_words(result: Evaluation | Replay) -> str:
    """The steps of each agent that the fallback answered; empty where it answered none."""
    steps = [f"{name} in {number(missed, 0)}" for name, missed in result.fallback_steps.items() if missed]
    total = count(result.step_latency.seconds.size, "step")
    at_once = sum(result.not_awaited.values())
    waited = f" ({number(at_once, 0)} without waiting for the policy)" if at_once else ""
    return f"{', '.join(steps)} of {total}{waited}, by {result.team.fallback}" if steps else ""


def fallback_line(result: Evaluation | Replay) -> str:
    """The steps that the fallback answered, as a further line of a heading; empty where it answered none."""
    words = _fallback_words(result)
    return f"\nanswered by the fallback: {words}" if words else ""


def fallback_tiles(result: Evaluation | Replay) -> list[tuple[str, str, str]]:
    """One tile with the number of steps, or none."""
    words = _fallback_words(result)
    total = number(sum(result.fallback_steps.values()), 0)
    return [("answered by the fallback", total, words)] if words else []


def _bundle(team: TeamDescription) -> str:
    digest = team.bundle_digest or "none: the team is not a bundle"
    return digest if team.version is None else f"{digest}, version {team.version}"


def version_line(result: Evaluation | Replay) -> str:
    """The version of a served team that answered, as a further line of a heading; empty for other teams."""
    team = result.team
    return (
        "" if team.version is None else f"\nversion {team.version}, bundle {(team.bundle_digest or '')[:12]}"
    )


def temperature_words(temperature: float) -> str:
    """A temperature of play, with its meaning where it has a name."""
    meaning = {0.0: ", deterministic actions", 1.0: ", sampled actions"}
    return f"{temperature:g}{meaning.get(temperature, '')}"


def origin(result: Evaluation | Replay) -> dict[str, str]:
    """Bundle, contract, versions, machine and date, for a list of provenance."""
    return {
        "Bundle": _bundle(result.team),
        "Contract": result.spec.contract_hash,
        "Versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "Machine": result.machine,
        "Date": result.date,
    }
