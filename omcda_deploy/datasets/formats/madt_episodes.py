"""Folders of torch-pickled SMAC episodes, one per file: MADT's data (Meng et al., 2021), which OMIGA trains on.

They are pickles, so a separate process (torch_episodes.py) loads them, which can make nothing but arrays of them;
files are taken in the order of their names. The layout is in docs/baselines.md#madt-episodes. Three things are not
in the files:

- No final observation was recorded. The last one stands in for it, as in OMIGA's loader; only the bootstrap at a
  time limit ever looks at it.
- Done flags do not tell a time limit, and are true for dead agents: an episode ends with its file, and one as long
  as the map's limit was ended by it.
- The centralised state is all agents' states joined, as OMIGA's mixer takes it.
"""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Claim, Episode, Recording
from omcda_deploy.datasets.smac_teams import checked_episode, team_of
from omcda_deploy.datasets.teams import Sizes
from omcda_deploy.errors import DatasetError, MissingExtraError
from omcda_deploy.spec import ActionSpec

SOURCE = "folder of torch-pickled episodes (MADT, OMIGA)"

_LOADER = Path(__file__).parents[1] / "torch_episodes.py"
_FRAME = struct.Struct("<cQ")
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF"  # first bytes of torch.save since 1.6, and before
_Arrays = dict[str, NDArray[Any]]


def recognizes(path: Path) -> bool:
    """True for a folder whose first file begins as torch's do, and is no .npz, which is a zip archive too.

    Run folders hold files of torch's as well, beside their configuration.
    """
    files = _files(path)
    if not files or files[0].suffix == ".npz" or any(file.suffix == ".json" for file in files):
        return False
    with files[0].open("rb") as file:
        return file.read(len(_LEGACY)).startswith((_ZIP, _LEGACY))


@contextmanager
def open_recording(path: Path, claim: Claim | None) -> Iterator[Recording]:
    """Open a folder of episodes. Raises :class:`DatasetError` naming the file that is no episode.

    Further errors are those of :func:`~omcda_deploy.datasets.smac_teams.team_of`.
    """
    files = _files(path)
    if not files:
        raise DatasetError(f"{path}: expected a {SOURCE}, found no files in it")
    with _loaded(files) as loaded:
        first = next(loaded)
        _, arrays = first
        states, observations, masks = (arrays[name] for name in ("states", "observations", "action_masks"))
        for name, values in (("states", states), ("observations", observations), ("availability", masks)):
            if values.ndim != 3:
                raise DatasetError(
                    f"{files[0]}: {name}: expected one vector per step, got shape {values.shape[2:]}"
                )
        sizes = Sizes.of_arrays(
            observations.shape[1],
            observations.shape[2],
            ActionSpec("discrete", masks.shape[2]),
            state_size=states.shape[1] * states.shape[2],
        )
        spec = team_of(path, claim, sizes)
        yield Recording(
            spec,
            len(files),
            (_episode(file, arrays, spec.episode_limit) for file, arrays in chain([first], loaded)),
        )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))


def _episode(file: Path, arrays: _Arrays, limit: int) -> Episode:
    observations, actions, rewards = arrays["observations"], arrays["actions"], arrays["rewards"]
    per_agent = observations.shape[:2]  # an agent's action and reward in one step are arrays of length 1
    if actions.size != rewards.size or actions.size != np.prod(per_agent):
        raise DatasetError(
            f"{file}: expected one action and one reward per agent and step, got shapes {actions.shape[2:]} and "
            f"{rewards.shape[2:]}"
        )
    return checked_episode(
        str(file),
        observations,
        arrays["states"],
        actions.reshape(per_agent),
        arrays["action_masks"],
        rewards.reshape(per_agent),
        timeout=len(observations) == limit,
    )


@contextmanager
def _loaded(files: Sequence[Path]) -> Iterator[Iterator[tuple[Path, _Arrays]]]:
    """Load ``files`` in a process of its own; yields an iterator of each with its arrays [T, N, …]."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "train")
    with (
        tempfile.TemporaryFile() as error_output,
        subprocess.Popen(
            [sys.executable, "-I", str(_LOADER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=error_output,
        ) as loader,
    ):
        try:
            assert loader.stdin is not None
            assert loader.stdout is not None
            loader.stdin.write(json.dumps([str(file) for file in files]).encode())
            loader.stdin.close()
            yield _frames(files, loader.stdout, loader, error_output)
        finally:
            loader.kill()


def _frames(
    files: Sequence[Path], stream: IO[bytes], loader: subprocess.Popen[bytes], error_output: IO[bytes]
) -> Iterator[tuple[Path, _Arrays]]:
    for file in files:
        header = stream.read(_FRAME.size)
        kind, size = _FRAME.unpack(header) if len(header) == _FRAME.size else (b"", 1)
        content = stream.read(size) if kind else b""
        if len(content) < size:
            status = loader.wait()
            error_output.seek(0)
            lines = error_output.read().decode(errors="replace").strip().splitlines() or [
                "it printed nothing"
            ]
            raise DatasetError(
                f"{file}: the process that loads torch files ended with status {status} ({lines[-1]}): check that "
                "this Python can import torch, and that there is memory for one file"
            )
        if kind == b"E":
            raise DatasetError(f"{file}: {content.decode()}")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            yield file, dict(archive)
