"""Commands that write datasets from others: ``import``, ``merge``, ``split``, ``subset`` and ``to-minari``."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import print_json
from omcda_deploy.commands.progress import progress_bar
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.errors import ConfigError

DatasetFile = Annotated[Path, typer.Argument(help="A dataset file.")]
MOST_EPISODES = 10**7  # that --episodes lists
Out = Annotated[Path, typer.Option(help="HDF5 file to write.")]


class RewardMode(StrEnum):
    """Values of ``--reward-mode``."""

    reward = "reward"
    return_to_go = "return_to_go"


@when_stopped()
def import_dataset(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of .npz episodes, Minari dataset, PyMARL file or folder of part_N.h5, folder of MADT's "
            "episodes, vault, or HDF5 in our layout without a team."
        ),
    ],
    out: Out,
    format: Annotated[
        str | None,
        typer.Option(
            help="npz_episodes, minari_folder, pymarl_hdf5, madt_episodes or og_vault; told from SOURCE if omitted."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A known task, or the name of a new one. SMAC's are told from SOURCE's path if omitted."
        ),
    ] = None,
    team: Annotated[
        Path | None, typer.Option(help="JSON file that describes the team (docs/datasets.md).")
    ] = None,
    control_rate: Annotated[float | None, typer.Option(help="Hz, of a new task.")] = None,
    episode_limit: Annotated[
        int | None, typer.Option(help="Steps, of a new task; 1000, or what SOURCE says, if omitted.")
    ] = None,
    reward_mode: Annotated[
        RewardMode, typer.Option(help="return_to_go: as OMIGA's and ComaDICE's published loaders.")
    ] = RewardMode.reward,
) -> None:
    """Turn logs, or a dataset of another format, into the HDF5 file that train, replay and inspect read."""
    from omcda_deploy.datasets.convert import convert
    from omcda_deploy.datasets.teams import read_team
    from omcda_deploy.datasets.writer import require_new_file

    require_new_file(out)
    spec = None if team is None else read_team(team)
    with progress_bar(f"importing {source.name}", "episodes") as report:
        summary = convert(
            source,
            out,
            format=format,
            task=task,
            team=spec,
            control_rate=control_rate,
            episode_limit=episode_limit,
            reward_mode=reward_mode.value,
            progress=report,
        )
    print_json(summary)


@when_stopped()
def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Datasets of one task, recorded with other --seed each.")
    ],
    out: Out,
    behavior: Annotated[
        str | None,
        typer.Option(help="Label of the behaviour; those of the files, joined by +, when omitted."),
    ] = None,
) -> None:
    """Join datasets of one task, recorded on several machines for instance; the files must fit together."""
    from omcda_deploy.datasets.merging import concatenate
    from omcda_deploy.datasets.summary import summarize
    from omcda_deploy.datasets.writer import require_new_file
    from omcda_deploy.registry import read_dataset

    require_new_file(out)
    concatenate(files, out, behavior)
    print_json(summarize(read_dataset(out)))


@when_stopped()
def split(
    file: DatasetFile,
    train: Annotated[Path, typer.Option(help="HDF5 file to write: the part to train on.")],
    held_out: Annotated[Path, typer.Option(help="HDF5 file to write: the part that is held out.")],
    share: Annotated[float, typer.Option(help="Share of the episodes that is held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed that draws them.")] = 0,
) -> None:
    """Split a dataset by episode into a part to train on and one that is held out."""
    from omcda_deploy.datasets import selection
    from omcda_deploy.datasets.writer import require_new_file

    require_new_file(train, "--train")
    require_new_file(held_out, "--held-out")
    print_json(selection.split(file, train, held_out, share=share, seed=seed))


@when_stopped()
def subset(
    file: DatasetFile,
    out: Out,
    episodes: Annotated[
        str | None, typer.Option(help="Numbers of episodes, with ranges: 0,5,100-199.")
    ] = None,
    returns: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Range of returns; either end may be left out.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="So many of those that are left, drawn.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --count.")] = 0,
) -> None:
    """Write a selection of a dataset's episodes; without conditions all of them, in the newest format version."""
    from omcda_deploy.datasets import selection
    from omcda_deploy.datasets.writer import require_new_file

    require_new_file(out)
    low, high = _range_of_returns(returns)
    summary = selection.subset(
        file,
        out,
        episodes=None if episodes is None else _numbers(episodes),
        least_return=low,
        largest_return=high,
        count=count,
        seed=seed,
    )
    print_json(summary)


@when_stopped()
def to_minari(
    file: DatasetFile,
    out: Annotated[
        Path,
        typer.Option(help="Folder to write, such as ~/.minari/datasets/cell/reach-v0: name and version."),
    ],
    task: Annotated[str | None, typer.Option(help="Task of a dataset that does not say.")] = None,
) -> None:
    """Write a dataset as one of Minari's; import reads it back."""
    from omcda_deploy.datasets.minari_export import write_minari
    from omcda_deploy.registry import read_dataset

    print_json(write_minari(read_dataset(file, task), out))


def _numbers(text: str) -> list[int]:
    """Read numbers and ranges of ``--episodes``. Raises :class:`ConfigError` for others."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--episodes: expected numbers and ranges such as 0,5,100-199, got {text!r}")
        span = range(int(first), int(last or first) + 1)
        if span.stop - span.start + len(numbers) > MOST_EPISODES:
            raise ConfigError(f"--episodes: expected at most {MOST_EPISODES} numbers, got {text!r}")
        numbers += span
    return numbers


def _range_of_returns(text: str | None) -> tuple[float, float]:
    """Read ``--returns``. Raises :class:`ConfigError` for anything but LOW:HIGH, with either end left out."""
    if text is None:
        return -math.inf, math.inf
    low, colon, high = text.partition(":")
    try:
        bounds = (float(low) if low.strip() else -math.inf, float(high) if high.strip() else math.inf)
    except ValueError:
        colon = ""
    if not colon or any(map(math.isnan, bounds)):
        raise ConfigError(f"--returns: expected LOW:HIGH, such as 10: or -5:5, got {text!r}")
    return bounds
