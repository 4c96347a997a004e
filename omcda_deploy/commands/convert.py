"""Command ``convert``: turn a published dataset into the format that all other commands read."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import console, progress_bar
from omcda_deploy.errors import DatasetError


class RewardMode(StrEnum):
    """Values of ``--reward-mode``."""

    reward = "reward"
    return_to_go = "return_to_go"


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of MADT's episodes, PyMARL .h5 file, or vault.")],
    out: Annotated[Path, typer.Option(help="HDF5 file to write.")],
    format: Annotated[
        str | None, typer.Option(help="madt_episodes, pymarl_hdf5 or og_vault; told from SOURCE if omitted.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="For instance smac/5m_vs_6m; told from SOURCE's path if omitted.")
    ] = None,
    reward_mode: Annotated[
        RewardMode, typer.Option(help="return_to_go: as OMIGA's and ComaDICE's published loaders.")
    ] = RewardMode.reward,
) -> None:
    """Convert a published SMAC dataset into the HDF5 file that train, replay and inspect read."""
    from omcda_deploy.datasets.convert import convert as write

    if out.exists():
        raise DatasetError(f"{out} exists already: choose another --out, or remove it first")
    if out.suffix != ".hdf5":
        raise DatasetError(f"{out}: expected a name ending in .hdf5, by which the file is read again")
    with progress_bar(f"converting {source.name}") as report:
        summary = write(source, out, format=format, task=task, reward_mode=reward_mode.value, progress=report)
    console.print_json(json.dumps(summary))
