"""Behaviour models that training finds in its cache, in place of ten thousand steps of cloning."""

from __future__ import annotations

from pathlib import Path

from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.files import cache_folder
from omcda_deploy.training.behavior_model import BehaviorConfig, fit
from omcda_deploy.training.checkpoint import save_state


def cache_behavior(path: Path, hidden: int = 8) -> Path:
    """Cache a model of one step for the dataset at ``path``, as if it had been cloned as usual; return its file."""
    dataset = read(path)
    model, report = fit(dataset, BehaviorConfig(steps=1, hidden=hidden))
    place = cache_folder() / "behavior" / f"{BehaviorConfig(hidden=hidden).key(dataset)}.pt"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_state(place, {"model": model.state_dict(), "report": report})
    return place
