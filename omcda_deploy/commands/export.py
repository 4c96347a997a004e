"""``export``: a run folder becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omcda_deploy.commands import console


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that  omcda-deploy train  made.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    step: Annotated[int | None, typer.Option(help="Policy of this step; the last when omitted.")] = None,
) -> None:
    """Export a trained team: one ONNX graph per agent and one for the team, checked against torch."""
    bundle = export_run(run, out, step)
    parity = bundle.manifest["parity"]
    worst = max(error["max_abs"] for error in parity["against_torch"].values())
    console.print(
        f"exported {out}: {len(bundle.spec.names)} agents, contract {bundle.spec.contract_hash[:12]}, at most "
        f"{worst:.1e} from torch over {parity['rows']} observations",
        highlight=False,
    )


def export_run(run: Path, out: Path, step: int | None = None) -> Any:
    """Export the policy of ``run`` at ``step`` (None: the last) and return the bundle."""
    from omcda_deploy.export.bundle import export_bundle
    from omcda_deploy.training.run_folder import read_config, read_snapshot, versions

    config, snapshot = read_config(run), read_snapshot(run, step)
    spec = config.spec
    nothing: dict[str, float | None] = dict.fromkeys(spec.names)
    return export_bundle(
        out,
        spec,
        snapshot.policy,
        snapshot.behavior,
        observations=snapshot.observations,
        action_masks=snapshot.action_masks,
        divergence_kind=snapshot.divergence_kind,
        budgets={**nothing, **(snapshot.budgets or {})},
        alphas={**nothing, **(snapshot.alphas or {})},
        provenance={
            "algorithm": config.algorithm,
            "settings": config.settings,
            "step": snapshot.step,
            "steps": config.steps,
            "seed": config.seed,
            "dataset_digest": config.dataset_digest,
            "time_limit_is_terminal": config.time_limit_is_terminal,
            "behavior": config.behavior,
            "versions": {"trained": config.versions, "exported": versions()},
        },
    )
