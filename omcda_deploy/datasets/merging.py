"""Datasets of one task joined into one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from omcda_deploy.datasets import Dataset, reward_mode
from omcda_deploy.datasets.fingerprints import fingerprints, repeats_itself
from omcda_deploy.datasets.formats.omiga_hdf5 import read, read_header
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.errors import ContractError, DatasetError
from omcda_deploy.spec import require_same_contract

OVERLAP = 0.05  # share of a file's episodes from which equal ones in another file are no chance

logger = logging.getLogger(__name__)


def concatenate(paths: Sequence[str | Path], out: str | Path, behavior: str | None = None) -> str:
    """Write the closed episodes of several files of one task into one; returns its digest.

    Reads each input once, and holds one at a time in memory. ``behavior`` labels the result (default: the inputs'
    labels, each once, joined by +); episodes keep the labels of the policies that acted, or else the name of their
    file. Metadata are kept where all inputs agree. Raises :class:`DatasetError`, also where the inputs do not fit,
    one has returns-to-go in place of rewards and another has not, or two of them hold the same episodes, whatever
    these are said to earn.
    """
    if not paths:
        raise DatasetError("expected at least one dataset to concatenate, got none")
    files = [Path(path) for path in paths]
    if Path(out).resolve() in [path.resolve() for path in files]:
        raise DatasetError(f"{out} is one of the inputs: expected another file for the result")
    headers = []
    for path in files:
        headers.append(read_header(path))
        try:
            require_same_contract(headers[0].spec, headers[-1].spec, str(files[0]), str(path))
        except ContractError as error:
            raise DatasetError(str(error)) from error
        ours, theirs = (reward_mode(header.metadata) for header in (headers[0], headers[-1]))
        if ours != theirs:  # the sums of one would be taken for rewards
            raise DatasetError(
                f"{files[0]} and {path} do not fit together: reward mode {ours} against {theirs}: import both with "
                "one  --reward-mode"
            )
    shared_metadata = {
        name: value
        for name, value in headers[0].metadata.items()
        if all(name in header.metadata and header.metadata[name] == value for header in headers)
    }
    labels = [
        str(header.metadata.get("behavior", path.stem)) for header, path in zip(headers, files, strict=True)
    ]
    exact = all(header.exact_behavior for header in headers)
    metadata = {**shared_metadata, "behavior": behavior or "+".join(dict.fromkeys(labels))}
    contents: dict[str, Path] = {}
    known: dict[int, Path] = {}
    with DatasetWriter(out, headers[0].spec, metadata) as writer:
        for path, label in zip(files, labels, strict=True):
            dataset = read(path)
            if (other := contents.setdefault(dataset.digest, path)) is not path:
                raise DatasetError(
                    f"{other} and {path} hold the same episodes: record each with a --seed of its own"
                )
            _require_others(dataset, path, known)
            writer.copy(dataset, range(len(dataset.episode_length)), label, with_behavior=exact)
            del dataset  # before the next one is read
    return writer.digest


def _require_others(dataset: Dataset, path: Path, known: dict[int, Path]) -> None:
    """Raise :class:`DatasetError` where a file repeats those whose episodes are ``known``; then add its own.

    A game of a few steps, whose episodes are equal by chance, tells nothing.
    """
    prints = fingerprints(dataset)
    if repeats_itself(prints):
        return
    names = prints.tolist()
    repeated = [name for name in names if name in known]
    if repeated:
        found = f"{len(repeated)} of the {len(names)} episodes of {path} are in {known[repeated[0]]} too"
        if len(repeated) > OVERLAP * len(names):
            raise DatasetError(
                f"{found}: merge the files that they come from, or take them out with  omcda-deploy subset"
            )
        logger.warning("%s, and are written twice", found)
    known.update(dict.fromkeys(names, path))
