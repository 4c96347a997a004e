"""Segments read back, up to where they are whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omcda_deploy.errors import DatasetError
from omcda_deploy.recordings import FORMAT, import_pyarrow
from omcda_deploy.recordings.columns import arrays_of
from omcda_deploy.recordings.segments import SUFFIX


@dataclass(frozen=True)
class SegmentContents:
    """A segment that was read. ``metadata``: of its schema. ``columns``: arrays of ``rows`` rows, by name.

    ``torn``: its last batch was not whole, and is not among the rows. ``closed``: it was ended by its writer.
    ``lost``: rows that its writer had lost when it wrote the last batch.
    """

    path: Path
    metadata: Mapping[str, str]
    columns: Mapping[str, Any]
    rows: int
    torn: bool
    closed: bool
    lost: int


def find_segments(folders: Sequence[Path]) -> list[Path]:
    """Return the segments of recordings, from the oldest. Raises :class:`DatasetError` for a folder without any."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(folder.rglob(f"*{SUFFIX}"))
        if not inside:
            state = "holds no segment of a recording" if folder.is_dir() else "is no folder"
            raise DatasetError(f"{folder} {state}: expected what  serve --record  writes")
        found += inside
    return sorted({path.resolve() for path in found}, key=lambda path: (path.name, path))


def read_segment(path: Path) -> SegmentContents | None:
    """Read a segment up to its last whole batch; None where not even its schema is whole.

    Raises :class:`DatasetError` for a file that cannot be read, or is no segment of a recording.
    """
    pa = import_pyarrow()
    try:
        with pa.memory_map(str(path)) as source:
            try:
                stream = pa.ipc.open_stream(source)
            except (pa.ArrowInvalid, OSError, EOFError) as error:
                if path.stat().st_size > 0 and not _begins_as_a_stream(path):
                    raise DatasetError(
                        f"{path}: expected a segment of a recording, got something else"
                    ) from error
                return None
            metadata = {key.decode(): value.decode() for key, value in (stream.schema.metadata or {}).items()}
            if metadata.get("format") != FORMAT:
                raise DatasetError(
                    f"{path}: expected {FORMAT!r} in its metadata, got {metadata.get('format')!r}: give a folder "
                    "that  serve --record  of this version has written"
                )
            batches: list[Any] = []
            notes: dict[str, str] = {}
            torn = False
            try:
                for batch, custom in _batches(stream):
                    batches.append(batch)
                    notes |= custom
            except (pa.ArrowInvalid, OSError, EOFError):
                torn = "closed" not in notes
            table = pa.Table.from_batches(batches, stream.schema)
            return SegmentContents(
                path,
                metadata,
                arrays_of(table),
                table.num_rows,
                torn,
                "closed" in notes,
                int(notes.get("lost", 0)),
            )
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error})") from error


def _batches(stream: Any) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yield the batches of a stream, and their own metadata."""
    while True:
        try:
            batch, metadata = stream.read_next_batch_with_custom_metadata()
        except StopIteration:
            return
        batch.validate(full=True)
        yield batch, {key.decode(): value.decode() for key, value in (metadata or {}).items()}


def _begins_as_a_stream(path: Path) -> bool:
    """Return whether a file is the beginning of a stream, which a writer that died has left."""
    with path.open("rb") as file:
        head = file.read(4)
    return b"\xff\xff\xff\xff".startswith(head)
