"""Evaluations and replays for people: one self-contained HTML file, and tables for the terminal.

A report is a list of sections, each made from one measurement or from several side by side::

    write_report("report.html", "HalfCheetah", [
        comparison_section({"dataset": episode_returns, "BC": bc, "OMCDA": omcda}),
        evaluation_section(omcda, "OMCDA"),
        replay_section(replayed),
    ])

The file loads nothing: no script, no font, no image. It follows the reader's light or dark preference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from omcda_deploy.formatting import digits_of
from omcda_deploy.play.evaluate import Evaluation
from omcda_deploy.play.measurements import Divergence, Latency, TeamDescription, write_text
from omcda_deploy.play.replay import Replay, agreement_measure
from omcda_deploy.report.figures import bars_figure, divergence_figures, latency_figure, returns_figure

Returns: TypeAlias = NDArray[np.float64]  # [E]
_DASH = "\u2013"


@dataclass(frozen=True)
class Section:
    """A part of a report: a plain heading, and a body of HTML whose every text is escaped already."""

    heading: str
    body: str


def write_report(path: str | Path, title: str, sections: Sequence[Section], summary: str = "") -> None:
    """Write the HTML file, whole or not at all. ``summary`` is a line of plain text under the title.

    Raises :class:`ConfigError` where ``path`` cannot be written.
    """
    lead = f'<p class="lead">{escape(summary)}</p>' if summary else ""
    body = "".join(f"<section><h2>{escape(s.heading)}</h2>{s.body}</section>" for s in sections)
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>{lead}</header>{body}</main></body></html>\n",
    )


def evaluation_section(evaluation: Evaluation, heading: str = "Evaluation") -> Section:
    """Returns, latency and divergence of one evaluation, its episodes, and where it came from."""
    e = evaluation
    quantity = _divergence_name(e.team)
    digits = digits_of(e.returns)
    tiles = [
        (
            "mean return",
            _with_error(e.mean, e.standard_error, digits),
            f"{e.returns.size} episodes, ± standard error{_lost(e)}",
        ),
        (
            "spread",
            _number(e.std, digits),
            f"std; {_number(e.returns.min(), digits)} to {_number(e.returns.max(), digits)}",
        ),
        (
            "mean length",
            _number(e.lengths.mean(), 0),
            f"{int((~e.terminated).sum())} of {e.returns.size} reached the time limit",
        ),
        _latency_tile(e.step_latency),
    ]
    if e.won is not None:
        tiles.insert(1, ("won", _percent(e.won.mean()), f"{int(e.won.sum())} of {e.won.size} episodes"))
    tiles += _fallback_tile(e)
    parts = [
        _tiles(tiles),
        captioned(
            returns_figure({"episodes": e.returns}), "Returns: every episode, the mean, one standard error."
        ),
        _agent_table(e.divergence, e.agent_latency, {"|a| > 0.999": _percents(e.saturation)}, quantity),
        *_divergence_parts(e.divergence, quantity),
        _latency_part(
            e.step_latency,
            f"One answer of the whole team for {_count(e.num_envs, 'environment')}; "
            "the deadline is one control period.",
            1 / e.spec.control_rate,
        ),
        _episode_table(e),
        provenance_list(
            {
                "Task": e.task,
                "Actions": "sampled" if e.stochastic else "deterministic",
                "Seed": str(e.seed),
                "Environments in step": str(e.num_envs),
                "Wall clock": f"{_number(e.seconds, 1)} s",
                **_origin(e.team, e.spec.contract_hash, e.versions, e.machine, e.date),
            }
        ),
    ]
    return Section(heading, "".join(parts))


def replay_section(replay: Replay, heading: str = "Replay") -> Section:
    """Agreement with the recorded actions, parity with the local bundle, deadlines, and where it came from."""
    r = replay
    quantity = _divergence_name(r.team)
    agreement = float(np.mean(list(r.agreement.values())))
    measure = agreement_measure(r.spec).replace("_recorded", " recorded").replace(" - ", " \u2212 ")
    tiles = [
        ("agreement", _number(agreement, 4), measure + ", mean over agents"),
        ("parity", *_parity_words(r)),
        _latency_tile(r.step_latency),
        (
            "deadline misses",
            _number(r.misses, 0),
            f"of {_number(r.step_latency.seconds.size, 0)} steps at {r.rate:g} Hz "
            f"({_number(1e3 / r.rate, 1)} ms), {'in real time' if r.paced else 'flat out'}",
        ),
        *_fallback_tile(r),
    ]
    parts = [
        _tiles(tiles),
        captioned(bars_figure(r.agreement, measure), "Agreement with the recorded actions."),
        _agent_table(
            r.divergence,
            r.agent_latency,
            {measure: {n: _number(v, 4) for n, v in r.agreement.items()}},
            quantity,
        ),
        _parity_table(r),
        *_divergence_parts(r.divergence, quantity),
        _latency_part(
            r.step_latency, f"One answer of the whole team for {_count(r.batch, 'episode')}.", 1 / r.rate
        ),
        provenance_list(
            {
                "Task": r.task,
                "Dataset": r.dataset_digest,
                "Episodes": f"{len(r.episodes)}, {_number(r.steps, 0)} joint actions",
                "Actions": "sampled" if r.stochastic else "deterministic",
                "Seed": str(r.seed),
                "Wall clock": f"{_number(r.seconds, 1)} s",
                **_origin(r.team, r.spec.contract_hash, r.versions, r.machine, r.date),
            }
        ),
    ]
    return Section(heading, "".join(parts))


def comparison_section(rows: Mapping[str, Evaluation | Returns], heading: str = "Comparison") -> Section:
    """Several evaluations in one table and one figure. A row may be bare returns [E], such as a dataset's."""
    header = ["", "mean", "standard error", "min", "max", "episodes", "p50, ms", "p95, ms", "p99, ms"]
    table = html_table(header, _comparison_rows(rows))
    figure = returns_figure({name: _returns(entry) for name, entry in rows.items()})
    return Section(
        heading,
        captioned(table, "Returns per episode, and the latency of one answer of the whole team.")
        + captioned(figure, "Every episode, the mean, one standard error."),
    )


def comparison_table(rows: Mapping[str, Evaluation | Returns], title: str = "Returns") -> Table:
    """:func:`comparison_section` for the terminal."""
    table = _terminal(title, "", ("mean", "std. error", "episodes", "p50 ms", "p95 ms", "p99 ms"))
    for name, mean, error, _, _, *rest in _comparison_rows(rows):
        table.add_row(name, mean, error, *rest)
    return table


def _won(evaluation: Evaluation) -> str:
    return "" if evaluation.won is None else f", {_percent(evaluation.won.mean())} won"


def _lost(evaluation: Evaluation) -> str:
    lost = evaluation.discarded
    return f"; {_count(lost, 'episode')} lost by the simulator and left out" if lost else ""


def _fallback_words(result: Evaluation | Replay) -> str:
    """How many steps of which agents the fallback answered; empty where it answered none."""
    steps = [f"{name} in {_number(count, 0)}" for name, count in result.fallback_steps.items() if count]
    total = _count(result.step_latency.seconds.size, "step")
    return f"{', '.join(steps)} of {total}, by {result.team.fallback}" if steps else ""


def _fallback_line(result: Evaluation | Replay) -> str:
    words = _fallback_words(result)
    return f"\nanswered by the fallback: {words}" if words else ""


def _fallback_tile(result: Evaluation | Replay) -> list[tuple[str, str, str]]:
    words = _fallback_words(result)
    total = _number(sum(result.fallback_steps.values()), 0)
    return [("answered by the fallback", total, words)] if words else []


def evaluation_table(evaluation: Evaluation) -> Table:
    """Per agent: divergence beside its budget, saturation, latency; the returns in the title."""
    e = evaluation
    table = _agents(
        f"{e.task}: return {_with_error(e.mean, e.standard_error, digits_of(e.returns))} over "
        f"{_count(e.returns.size, 'episode')}{_won(e)}{_lost(e)}\n"
        f"one answer of the team: {_latency_words(e.step_latency)}{_fallback_line(e)}",
        "|a|>0.999",
        _timed(e.divergence, e.agent_latency),
    )
    for name, divergence in e.divergence.items():
        table.add_row(
            name,
            *_divergence_cells(divergence),
            _percent(e.saturation[name]),
            *(_latency_cells(e.agent_latency.get(name)) if _timed(e.divergence, e.agent_latency) else ()),
        )
    return table


def replay_table(replay: Replay) -> Table:
    """Per agent: divergence, agreement, latency; parity and deadlines in the title."""
    r = replay
    parity, detail = _parity_words(r)
    table = _agents(
        f"{r.task}: {_count(len(r.episodes), 'episode')}, {_number(r.steps, 0)} joint actions\n"
        f"parity: {parity}{'' if parity == 'exact' else ', ' + detail}\n"
        f"one answer of the team: {_latency_words(r.step_latency)}; {r.misses} of {r.step_latency.seconds.size} "
        f"missed {1e3 / r.rate:.1f} ms {'in real time' if r.paced else 'flat out'}{_fallback_line(r)}",
        "|a-a_rec|" if r.spec.action_kind == "continuous" else "equal",
        _timed(r.divergence, r.agent_latency),
    )
    for name, divergence in r.divergence.items():
        table.add_row(
            name,
            *_divergence_cells(divergence),
            _number(r.agreement[name], 4),
            *(_latency_cells(r.agent_latency.get(name)) if _timed(r.divergence, r.agent_latency) else ()),
        )
    return table


def _agents(title: str, extra: str, timed: bool) -> Table:
    latencies = ("p50 ms", "p95 ms", "p99 ms") if timed else ()
    return _terminal(title, "agent", ("divergence", "p99", "budget", extra, *latencies))


def _terminal(title: str, first: str, numbers: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _divergence_cells(divergence: Divergence) -> list[str]:
    return [
        _number(divergence.mean, 4),
        _number(divergence.p99, 4),
        _DASH if divergence.budget is None else _number(divergence.budget, 4),
    ]


def _timed(agents: Iterable[str], latency: Mapping[str, Latency]) -> bool:
    """Whether agents were timed one by one; a joint graph is timed as a whole, which the step's latency shows."""
    return any(name in latency for name in agents)


def _latency_cells(latency: Latency | None) -> list[str]:
    return [_DASH] * 3 if latency is None else [_ms(latency, q) for q in (50, 95, 99)]


def _returns(entry: Evaluation | Returns) -> Returns:
    return entry.returns if isinstance(entry, Evaluation) else np.asarray(entry, np.float64)


def _comparison_rows(rows: Mapping[str, Evaluation | Returns]) -> list[list[str]]:
    digits = digits_of(np.concatenate([_returns(entry) for entry in rows.values()]))
    return [[name, *_comparison_cells(entry, digits)] for name, entry in rows.items()]


def _comparison_cells(entry: Evaluation | Returns, digits: int) -> list[str]:
    returns = _returns(entry)
    error = returns.std(ddof=1) / math.sqrt(returns.size) if returns.size > 1 else math.nan
    return [
        *(_number(value, digits) for value in (returns.mean(), error, returns.min(), returns.max())),
        str(returns.size),
        *_latency_cells(entry.step_latency if isinstance(entry, Evaluation) else None),
    ]


def _parity_words(replay: Replay) -> tuple[str, str]:
    parity = replay.parity
    if parity is None:
        return _DASH, "no local bundle was given"
    if parity.exact:
        return "exact", "equal to the local bundle to the last digit"
    worst = max(parity.action, parity.divergence, parity.parameters)
    if math.isnan(worst):
        return _DASH, "every step was answered by the fallback"
    return f"{worst:.2g}", "largest difference from the local bundle"


def _number(value: float | np.floating[Any], digits: int = 1) -> str:
    if not math.isfinite(value):
        return _DASH if math.isnan(value) else ("∞" if value > 0 else "\u2212∞")
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "\u2212")


def _with_error(mean: float, error: float, digits: int) -> str:
    shown = _number(mean, digits)
    return shown if math.isnan(error) else f"{shown} ± {_number(error, digits)}"


def _percent(share: float | np.floating[Any] | None) -> str:
    return _DASH if share is None else f"{100 * float(share):.1f} %"


def _percents(shares: Mapping[str, float | None]) -> dict[str, str]:
    return {name: _percent(share) for name, share in shares.items()}


def _ms(latency: Latency, q: float) -> str:
    return _number(latency.percentile(q), 2)


def _latency_words(latency: Latency) -> str:
    return ", ".join(f"p{q} {_ms(latency, q)} ms" for q in (50, 95, 99))


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _divergence_name(team: TeamDescription) -> str:
    return {"kl": "KL(π ‖ π_b)", "neg_log_behavior": "\u2212log π_b(a | o)"}.get(
        team.divergence_kind or "", "divergence"
    )


def _latency_tile(latency: Latency) -> tuple[str, str, str]:
    return (
        "latency p50",
        f"{_ms(latency, 50)} ms",
        f"p95 {_ms(latency, 95)} ms, p99 {_ms(latency, 99)} ms, whole team",
    )


def _tiles(tiles: Iterable[tuple[str, str, str]]) -> str:
    return (
        '<div class="tiles">'
        + "".join(
            f'<div><span class="what">{escape(what)}</span><strong>{escape(value)}</strong>'
            f'<span class="detail">{escape(detail)}</span></div>'
            for what, value, detail in tiles
        )
        + "</div>"
    )


def captioned(content: str, caption: str) -> str:
    """HTML of a figure or table with a line of plain text under it."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML of a table of plain texts; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _agent_table(
    divergence: Mapping[str, Divergence],
    latency: Mapping[str, Latency],
    extra: Mapping[str, Mapping[str, str]],
    quantity: str,
) -> str:
    header = ["agent", f"{quantity}, nats", "p99, nats", "budget d, nats", *extra]
    timed = _timed(divergence, latency)
    header += ["p50, ms", "p95, ms", "p99, ms"] if timed else []
    rows = [
        [
            name,
            *_divergence_cells(value),
            *(column[name] for column in extra.values()),
            *(_latency_cells(latency.get(name)) if timed else []),
        ]
        for name, value in divergence.items()
    ]
    return captioned(
        html_table(header, rows), f"Per agent: {quantity} averaged over all steps, and its 99th percentile."
    )


def _parity_table(replay: Replay) -> str:
    parity = replay.parity
    if parity is None:
        return ""
    rows = [
        [what, "0" if value == 0 else f"{value:.3g}"]
        for what, value in (
            ("action", parity.action),
            ("divergence, nats", parity.divergence),
            ("distribution parameters", parity.parameters),
        )
    ]
    return captioned(
        html_table(["output", "largest |difference|"], rows),
        f"Parity with the local bundle {(parity.local_digest or '')[:16]}, asked with the same batches.",
    )


def _divergence_parts(divergence: Mapping[str, Divergence], quantity: str) -> list[str]:
    budgets = {name: value.budget for name, value in divergence.items()}
    limit = "" if all(value is None for value in budgets.values()) else "; the mark is the budget d"
    panels = divergence_figures({n: v.by_step for n, v in divergence.items()}, budgets, quantity)
    return [
        captioned(
            bars_figure({n: v.mean for n, v in divergence.items()}, f"mean {quantity}, nats", budgets),
            f"Divergence from the behavior policy per agent{limit}.",
        ),
        captioned(
            f'<div class="panels">{"".join(panels)}</div>',
            f"{quantity} over the episode, mean over the episodes still running at each step.",
        ),
    ]


def _latency_part(latency: Latency, caption: str, deadline: float) -> str:
    return captioned(latency_figure(latency.seconds, deadline), caption)


def _episode_table(evaluation: Evaluation) -> str:
    e = evaluation
    header = ["episode", "seed", "return", "length", "ended by", *(["won"] if e.won is not None else [])]
    rows = [
        [
            str(k),
            str(e.episode_seeds[k]),
            _number(e.returns[k], digits_of(e.returns) + 1),
            str(e.lengths[k]),
            "terminal" if e.terminated[k] else "time limit",
            *(["yes" if e.won[k] else "no"] if e.won is not None else []),
        ]
        for k in range(e.returns.size)
    ]
    return f"<details><summary>All {e.returns.size} episodes</summary>{html_table(header, rows)}</details>"


def _origin(
    team: TeamDescription, contract_hash: str, versions: Mapping[str, str], machine: str, date: str
) -> dict[str, str]:
    return {
        "Bundle": team.bundle_digest or "none: the team is not a bundle",
        "Contract": contract_hash,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Machine": machine,
        "Date": date,
    }


def provenance_list(entries: Mapping[str, str]) -> str:
    """HTML of names and plain texts that say where numbers come from."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f'<h3>Provenance</h3><dl class="provenance">{rows}</dl>'


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#5b6570;--rule:#dde2e7;--panel:#f6f8fa;
--data:#2364aa;--limit:#b3460f;--s0:#2364aa;--s1:#cf6a16;--s2:#2e8b57;--s3:#b8324f;--s4:#75519a;--s5:#8a6a2c;
--s6:#158f96;--s7:#c9509a;--s8:#66717d;--s9:#8f9a17}
@media (prefers-color-scheme:dark){:root{--page:#14181d;--text:#e3e7eb;--soft:#9aa5b1;--rule:#313942;
--panel:#1c2229;--data:#6fb1f2;--limit:#f0a35e;--s0:#6fb1f2;--s1:#f0a35e;--s2:#6cc79a;--s3:#f0788f;--s4:#b89be0;
--s5:#cfae6a;--s6:#57c9cf;--s7:#ee92c8;--s8:#a9b3be;--s9:#c9d356}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .35rem}
h2{font-size:1.3rem;font-weight:650;margin:0 0 1rem}
h3{font-size:1rem;font-weight:650;margin:2rem 0 .6rem}
.lead{color:var(--soft);margin:0}
section{margin-top:2.5rem;padding-top:1.75rem;border-top:1px solid var(--rule)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.75rem;margin-bottom:1.75rem}
.tiles div{background:var(--panel);border-radius:8px;padding:.8rem 1rem .75rem}
.tiles span{display:block;font-size:.8rem;color:var(--soft)}
.tiles strong{display:block;font-size:1.3rem;font-weight:600;line-height:1.4}
.tiles strong,table,dd{font-variant-numeric:tabular-nums}
figure{margin:1.75rem 0}
figcaption{font-size:.85rem;color:var(--soft);margin-top:.35rem}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .name,svg .mark{fill:var(--text)}
svg .limit-text{fill:var(--limit)}
svg .grid{stroke:var(--rule)}
svg .axis{stroke:var(--soft)}
svg .dot{fill:var(--data);fill-opacity:.45}
svg .mean,svg .bar{fill:var(--data)}
svg .mean{stroke:var(--page);stroke-width:1.5}
svg .whisker{stroke:var(--data);stroke-width:2.5}
svg .curve{fill:none;stroke:var(--data);stroke-width:1.5;stroke-linejoin:round}
svg .quantile{stroke:var(--text);stroke-dasharray:2 3}
svg .limit{stroke:var(--limit);stroke-width:2}
svg .s0{color:var(--s0)}svg .s1{color:var(--s1)}svg .s2{color:var(--s2)}svg .s3{color:var(--s3)}
svg .s4{color:var(--s4)}svg .s5{color:var(--s5)}svg .s6{color:var(--s6)}svg .s7{color:var(--s7)}
svg .s8{color:var(--s8)}svg .s9{color:var(--s9)}svg .pale{opacity:.55}
svg .filled{fill:currentColor}
svg .stroked{fill:none;stroke:currentColor;stroke-width:1.75;stroke-linejoin:round}
svg .run{fill:var(--page);stroke:var(--text);stroke-width:1}
svg .error{stroke:var(--text);stroke-width:1.5}
svg .dashed{stroke-width:1.5;stroke-dasharray:6 4}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(24rem,1fr));gap:1rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr));gap:1rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.4rem .75rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child{text-align:left;padding-left:0}
thead th{font-weight:500;font-size:.8rem;color:var(--soft);vertical-align:bottom}
tbody th{font-weight:500}
td:last-child,th:last-child{padding-right:0}
details{margin:1.5rem 0}
summary{cursor:pointer;color:var(--soft);font-size:.9rem}
.provenance{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.25rem;margin:0;font-size:.85rem}
.provenance dt{color:var(--soft)}
.provenance dd{margin:0;overflow-wrap:anywhere}
@media print{body{font-size:12px}main{max-width:none;padding:0}section{break-inside:auto}figure{break-inside:avoid}}
""".replace("\n", "")
