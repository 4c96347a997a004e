"""Behaviour models that training finds in its cache, in place of ten thousand steps of cloning."""

from __future__ import annotations

from pathlib import Path

from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.files import cache_folder
from omcda_deploy.training.behavior_model import BehaviorConfig, fit
from omcda_deploy.training.checkpoint import save_state

SEEDS = range(5)  # of runs that find a model


def cache_behavior(path: Path, hidden: int = 8) -> Path:
    """Cache models of one step for the dataset at ``path``, as if cloned as usual; return that of seed 0."""
    dataset = read(path)
    folder = cache_folder() / "behavior"
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for seed in SEEDS:
        model, report = fit(dataset, BehaviorConfig(steps=1, hidden=hidden, seed=seed))
        places.append(folder / f"{BehaviorConfig(hidden=hidden, seed=seed).key(dataset)}.pt")
        save_state(places[-1], {"model": model.state_dict(), "report": report})
    return places[0]
