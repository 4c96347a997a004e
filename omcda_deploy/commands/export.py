"""``export``: turn a run folder into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import print_text
from omcda_deploy.commands.stopping import when_stopped


@when_stopped()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, made by  omcda-deploy train.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    step: Annotated[
        int | None, typer.Option(help="Training step of the policy; default: the last one kept.")
    ] = None,
) -> None:
    """Export a trained team: one ONNX graph per agent and one for the team, checked against torch."""
    from omcda_deploy.experiments import export as experiment

    bundle = experiment.export(run, out, step)
    parity = bundle.manifest["parity"]
    worst = max(error["max_abs"] for error in parity["against_torch"].values())
    print_text(
        f"exported {out}: {len(bundle.spec.names)} agents, contract {bundle.spec.contract_hash[:12]}, at most "
        f"{worst:.1e} from torch over {parity['rows']} observations"
    )
