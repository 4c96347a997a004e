"""Export of a training run: a run folder becomes a bundle."""

from __future__ import annotations

from pathlib import Path

from omcda_deploy.bundle import Bundle


def export_run(run: Path, out: Path, step: int | None = None) -> Bundle:
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
