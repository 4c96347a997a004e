"""``inspect``: what a dataset, a bundle or a run folder holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from omcda_deploy.commands import AsJson, DatasetTask, print_json, print_table
from omcda_deploy.errors import ConfigError
from omcda_deploy.formatting import UNKNOWN, count, significant

if TYPE_CHECKING:
    from omcda_deploy.bundle import Bundle
    from omcda_deploy.spec import TeamSpec
    from omcda_deploy.training.run_folder import RunConfig

PROVENANCE = (
    "algorithm",
    "tier",
    "step",
    "ppo_steps",
    "seed",
    "dataset_digest",
)  # as a bundle's table shows it


class GuessingGroup(TyperGroup):
    """Commands per kind of file; a path in their place is told by what lies there."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and (path := self._path_in(args)) is not None:
            args = [kind_of(path), *args]
        return super().parse_args(ctx, args)

    def _path_in(self, args: list[str]) -> Path | None:
        """Return the path that stands in a command's place, or alone where its name is also a command's."""
        options = [option for command in self.commands.values() for option in command.params]
        valued = {name for option in options if not getattr(option, "is_flag", False) for name in option.opts}
        words = [
            word
            for before, word in zip(["", *args], args, strict=False)
            if not word.startswith("-") and before not in valued
        ]
        asks_help = bool({"-h", "--help"} & set(args))
        alone = len(words) == 1 and os.path.lexists(words[0]) and not asks_help
        return Path(words[0]) if words and (words[0] not in self.commands or alone) else None


app = typer.Typer(
    cls=GuessingGroup,
    help="Look at a dataset, a bundle or a run folder:  omcda-deploy inspect PATH  tells which by what lies there.",
    no_args_is_help=True,
)


def kind_of(path: Path) -> str:
    """Return the command for a path. Raises :class:`ConfigError` where nothing that can be inspected lies there."""
    from omcda_deploy.bundle import MANIFEST
    from omcda_deploy.registry import foreign_format_of

    if not os.path.lexists(path) and not path.suffix:
        raise ConfigError(f"{path}: no such file or folder: expected a dataset, a bundle or a run folder")
    if (path / MANIFEST).exists():
        return "bundle"
    if (path / "config.json").exists() and (path / "policies").is_dir():
        return "run"
    if not path.is_dir() or foreign_format_of(path) is not None:
        return "dataset"  # whose reader says what is wrong with it
    below = sorted(found.parent for name in (MANIFEST, "config.json") for found in path.glob(f"*/{name}"))
    advice = f"look at one of those in it, such as {below[0]}" if below else "name another path"
    raise ConfigError(
        f"{path}: expected a dataset, a bundle or a run folder, found a folder of none: {advice}"
    )


@app.command("dataset")
def inspect_dataset(
    file: Annotated[Path, typer.Argument(help="A dataset file.")],
    task: DatasetTask = None,
    as_json: AsJson = False,
) -> None:
    """Print shapes, episodes, returns, actions and digest of a dataset."""
    from omcda_deploy.datasets.summary import render_table, summarize
    from omcda_deploy.registry import read_dataset

    summary = summarize(read_dataset(file, task))
    if as_json:
        print_json(summary)
    else:
        print_table(render_table(summary))


@app.command("bundle")
def inspect_bundle(
    folder: Annotated[Path, typer.Argument(help="A bundle.")], as_json: AsJson = False
) -> None:
    """Verify a bundle and print its team, inputs, actions, origin and digest; with --json its manifest."""
    from omcda_deploy.bundle import read_bundle

    bundle = read_bundle(folder)
    if as_json:
        print_json(dict(bundle.manifest))
        return
    print_table(_bundle_table(bundle))
    print_table(_agent_table(bundle))


@app.command("run")
def inspect_run(
    folder: Annotated[Path, typer.Argument(help="A run folder.")], as_json: AsJson = False
) -> None:
    """Print what a run trains, how far it is, and the policies that it keeps; with --json its configuration."""
    from omcda_deploy.training.run_folder import read_config, saved_step, snapshot_steps

    config = read_config(folder)
    if as_json:
        print_json({**vars(config), "step": saved_step(folder), "policies": snapshot_steps(folder)})
    else:
        print_table(_run_table(config, saved_step(folder), snapshot_steps(folder)))


def _bundle_table(bundle: Bundle) -> Table:
    from omcda_deploy.bundle import input_names, output_names

    manifest = bundle.manifest
    table = _team_table(bundle.spec)
    table.add_row("inputs", ", ".join(input_names(bundle.spec)))
    table.add_row("outputs", ", ".join(output_names(bundle.spec)))
    table.add_row("divergence", f"{bundle.divergence_kind}, in nats")
    training: Mapping[str, Any] = manifest.get("training", {})  # a bundle may have been made without
    for name in PROVENANCE:
        if name in training:
            table.add_row(name.replace("_", " "), str(training[name]))
    if (parity := manifest.get("parity")) is not None:
        worst = max(error["max_abs"] for error in parity["against_torch"].values())
        table.add_row("parity", f"at most {worst:.1e} from torch over {parity['rows']} observations")
    size = sum((bundle.path / file).stat().st_size for file in manifest["files"])
    table.add_row(
        "files", f"{len(manifest['files'])}, {size / 1e3:,.0f} kB, as their sha256 in the manifest say"
    )
    table.add_row("contract", bundle.spec.contract_hash)
    table.add_row("digest", bundle.digest)
    return table


def _team_table(spec: TeamSpec) -> Table:
    """Make a table of what all agents share."""
    normalised = {
        "none": "raw, as the simulator gives them",
        "per-vector-standardize": "raw or normalised alike: each vector is standardised in the graph",
    }
    noise = "standard normal" if spec.action_kind == "continuous" else "Gumbel, one number per choice"
    table = Table(title=spec.task, show_header=False)
    table.add_row("agents", ", ".join(spec.names))
    table.add_row("observations", f"float32, {normalised[spec.normalizer.kind]}")
    table.add_row("noise", f"{noise}; zeros for the deterministic action")
    table.add_row("control rate", f"{spec.control_rate:g} Hz")
    table.add_row("episode limit", f"{spec.episode_limit:,} steps")
    return table


def _agent_table(bundle: Bundle) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in (
        "agent",
        "observation",
        "action",
        "budget d, nats",
        "price alpha",
        "p99 in the data, nats",
    ):
        table.add_column(column, justify="left" if column in ("agent", "action") else "right")
    for agent in bundle.spec.agents:
        entry: Mapping[str, Any] = bundle.manifest["agents"][agent.name]
        reference = bundle.references.get(agent.name)
        action = agent.action
        bounds = f"{count(action.size, 'number')} from {action.low:g} to {action.high:g}"
        table.add_row(
            agent.name,
            count(agent.observation_size, "number"),
            bounds if action.kind == "continuous" else str(action),
            significant(entry.get("budget")),
            significant(entry.get("alpha")),
            UNKNOWN if reference is None else significant(reference.divergence_p99),
        )
    return table


def _run_table(config: RunConfig, step: int, policies: list[int]) -> Table:
    from omcda_deploy.registry import load_algorithm
    from omcda_deploy.training.recipes import recipe
    from omcda_deploy.training.settings import changed_settings

    spec = config.spec
    kind = load_algorithm(config.algorithm).Config
    table = Table(title=f"{config.algorithm} on {spec.task}", show_header=False)
    table.add_row("agents", ", ".join(spec.names))
    table.add_row("step", f"{step:,} of {config.steps:,} (the newest state)")
    kept = f"{len(policies)}, of steps {policies[0]:,} to {policies[-1]:,}" if policies else "none yet"
    table.add_row("policies", kept)
    table.add_row("seed", str(config.seed))
    changed = changed_settings(kind, config.settings)
    table.add_row(
        "settings", " ".join(f"{name}={value}" for name, value in changed.items()) or "the defaults"
    )
    # Those of the recipes as they are today, which may differ from what the run was trained with.
    recipes = recipe(spec.task, config.algorithm, config.recipe or None)
    followed = {name: value for name, value in changed.items() if recipes.get(name) == value}
    if followed:
        table.add_row("  of them a recipe's", " ".join(f"{k}={v}" for k, v in followed.items()))
    table.add_row("held-out NLL of the clone", significant(config.behavior.get("held_out_nll")) + " nats")
    table.add_row("dataset", config.dataset or "in memory")
    table.add_row("dataset digest", config.dataset_digest)
    table.add_row("device", f"{config.device}, threads {config.threads}")
    for name, version in config.versions.items():
        table.add_row(f"version of {name}", version)
    return table
