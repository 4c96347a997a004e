"""Load torch-pickled episodes in a process of its own, and hand them on as plain arrays.

A program, not a module: run as ``python -I`` with a JSON list of files on stdin, it imports torch and numpy and
nothing of this package. Unpickling may construct numpy's arrays and numbers; a pickle that refers to anything else
is refused before that is called. On stdout comes one frame per file, in their order: ``A`` and an npz archive
without pickles, or ``E`` and a description of the file's fault, which ends the run. A frame is its letter, its
length (uint64) and its content.

An episode is a list over agents of lists over time of [state, observation, action, reward, done, availability]
(docs/baselines.md#madt-episodes); the arrays are [T, N, …] each.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

FRAME = struct.Struct("<cQ")
FIELDS = {"states": 0, "observations": 1, "actions": 2, "rewards": 3, "action_masks": 5}
ENTRIES = 6  # per step; done is not used, as agents that died before the episode's end have it set too


class MalformedError(Exception):
    """A file that holds no episode."""


def load(file: str) -> Any:
    """Unpickle a file. Raises :class:`MalformedError`, also for a pickle that refers to other code."""
    import torch

    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and numpy 2
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        if reference := re.search(r"GLOBAL (\S+)", str(error)):
            raise MalformedError(
                f"expected a pickle of arrays and numbers, got one that refers to {reference[1]}, which was not "
                "run: take the data from their authors, and do not open this file with anything else"
            ) from error
        # torch's own message is left out: it recommends to load the file again in a way that runs its code.
        raise MalformedError(
            "damaged, or no episode of arrays and numbers; nothing of it was run: download it again "
            f"({type(error).__name__})"
        ) from error


def arrays(episode: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays [T, N, …] of :data:`FIELDS` from an unpickled episode. Raises :class:`MalformedError`."""
    layout = (
        "a list over agents of lists over time of [state, observation, action, reward, done, availability]"
    )
    if not isinstance(episode, list) or not all(isinstance(agent, list) for agent in episode):
        raise MalformedError(f"expected {layout}, got another layout: choose the --format that it is in")
    lengths = [len(agent) for agent in episode]
    if not lengths or min(lengths) != max(lengths) or not min(lengths):
        raise MalformedError(
            f"invalid data: expected equally many steps of every agent, got {lengths}: take the file out of the "
            "folder (OMIGA's loader passes over such files too)"
        )
    if any(
        not isinstance(step, (list, tuple)) or len(step) != ENTRIES for agent in episode for step in agent
    ):
        raise MalformedError(f"expected {layout}, got steps of another kind")
    result = {}
    for name, entry in FIELDS.items():
        try:
            values = np.asarray([[step[entry] for step in agent] for agent in episode])
        except ValueError:
            raise MalformedError(
                f"invalid data: {name} of unequal shapes: take the file out of the folder"
            ) from None
        if values.dtype.kind not in "fiub":
            raise MalformedError(f"invalid data: expected numbers as {name}, got {values.dtype}")
        result[name] = values.swapaxes(0, 1)
    return result


def send(out: BinaryIO, kind: bytes, content: bytes) -> None:
    """Write one frame."""
    out.write(FRAME.pack(kind, len(content)) + content)
    out.flush()


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not come between the frames
    for file in json.load(sys.stdin):
        archive = io.BytesIO()
        try:
            np.savez(archive, **arrays(load(file)))  # type: ignore[arg-type]
        except MalformedError as error:
            send(out, b"E", str(error).encode())
            return
        send(out, b"A", archive.getvalue())


if __name__ == "__main__":
    main()
