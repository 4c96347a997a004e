"""Export of a training run: a run folder becomes a bundle."""

from __future__ import annotations

from pathlib import Path

from omcda_deploy.bundle import Bundle


def export(run: str | Path, out: str | Path, step: int | None = None) -> Bundle:
    """Export the policy of ``run`` at ``step`` (None: the last) to the new folder ``out``; return the bundle.

    Raises :class:`ConfigError` where ``run`` is no run folder or has no such policy, :class:`BundleError` where
    ``out`` exists, and :class:`ExportError` where the graphs do not answer as the policy does.
    """
    from omcda_deploy.export.bundle import export_bundle
    from omcda_deploy.training.run_folder import read_config, read_snapshot, versions

    run, out = Path(run), Path(out)
    config, snapshot = read_config(run), read_snapshot(run, step)
    spec = config.spec
    absent: dict[str, float | None] = dict.fromkeys(spec.names)
    return export_bundle(
        out,
        spec,
        snapshot.policy,
        snapshot.behavior,
        observations=snapshot.observations,
        action_masks=snapshot.action_masks,
        divergence_kind=snapshot.divergence_kind,
        budgets={**absent, **(snapshot.budgets or {})},
        alphas={**absent, **(snapshot.alphas or {})},
        provenance={
            "algorithm": config.algorithm,
            "settings": config.settings,
            "step": snapshot.step,
            "steps": config.steps,
            "seed": config.seed,
            "dataset_digest": config.dataset_digest,
            "episodes": snapshot.episodes,
            "time_limit_is_terminal": config.time_limit_is_terminal,
            "behavior": config.behavior,
            "versions": {"trained": config.versions, "exported": versions()},
        },
    )
