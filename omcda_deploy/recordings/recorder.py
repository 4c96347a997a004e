"""The thread that writes a recording. Whoever records hands it references, and never waits for it.

Between the two is a queue, bounded in bytes. If the disk is slow, the queue is full and further rows are lost; if
it is full, the rows that cannot be written are. Both are counted, and steps go on.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np

from omcda_deploy.recordings import import_pyarrow
from omcda_deploy.recordings.columns import Column, Values, batch_of, schema_of
from omcda_deploy.recordings.memory import return_library_pages
from omcda_deploy.recordings.segments import RecordingLimits, Segment, make_room, require_recordable

log = logging.getLogger(__name__)

FLUSH_S = 0.5  # between two writes
FLUSH_BYTES, QUEUE_BYTES = 1 << 20, 8 << 20  # after which it writes at once, and which may wait
SAMPLE_BYTES = 512  # of the objects that a sample consists of, besides its numbers
PIECE = 256  # samples that are encoded at once: in between, whoever answers steps may run
PAUSE_S = 0.0002
CLOSE_LIMIT_S = 5.0
QUEUE, DISK = "queue", "disk"  # why rows are lost


class Source(Protocol):
    """Samples that are recorded under one schema."""

    @property
    def folder(self) -> str:
        """Its name in the recording."""
        ...

    @property
    def columns(self) -> Sequence[Column]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def values(self, samples: Sequence[Any]) -> Mapping[str, Values]:
        """Return columns of a few samples; called by the writing thread."""
        ...

    def derived(self, values: Mapping[str, Values]) -> Mapping[str, Values]:
        """Return the other columns, which are computed of those of many samples."""
        ...


class Tally:
    """Rows that were recorded, and lost by reason: by all recorders that share it."""

    def __init__(self) -> None:
        self.recorded = 0
        self.lost: Counter[str] = Counter({QUEUE: 0, DISK: 0})


class Recorder:
    """Records samples of any number of sources into ``folder``, from its making until :meth:`close`.

    ``tally``: shared with earlier recorders, if their rows are to be counted together. Raises :class:`ConfigError`
    for a folder that cannot be written, :class:`MissingExtraError` without pyarrow.
    """

    def __init__(
        self, folder: Path, limits: RecordingLimits | None = None, tally: Tally | None = None
    ) -> None:
        require_recordable(folder)
        if "pyarrow" not in sys.modules:
            import_pyarrow()  # now, as it takes a tenth of a second
            return_library_pages()
        self.folder = folder
        self.tally = Tally() if tally is None else tally
        self._limits = RecordingLimits() if limits is None else limits
        self._queue: deque[tuple[Source, Any, int, int]] = deque()
        self._lock = threading.Lock()  # of the counts
        self._waiting = 0  # bytes in the queue and in work
        self._segments: dict[Source, Segment] = {}
        self._schemas = WeakKeyDictionary[Source, Any]()
        self._room = 0  # bytes that may be written until the sizes of all segments are looked at again
        self._failing = False
        self._id, self._lost_before = uuid4().hex[:8], self.tally.lost.total()
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def put(self, source: Source, sample: Any, rows: int, size: int) -> None:
        """Record a sample of ``rows`` rows, whose numbers take ``size`` bytes. Never waits."""
        size += SAMPLE_BYTES
        with self._lock:
            if self._waiting + size > QUEUE_BYTES or self._closing:
                self.tally.lost[QUEUE] += rows
                return
            self._waiting += size
            self._queue.append((source, sample, rows, size))
            urgent = self._waiting > FLUSH_BYTES
        if urgent:
            self._wake.set()

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """Write what is waiting and close the segments; what takes longer than ``limit_s`` seconds is lost."""
        with self._lock:
            self._closing = True
        self._wake.set()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            self._flush()
            self._rotate()
        self._flush()
        for segment in self._segments.values():
            segment.close(self._notes())

    def _flush(self) -> None:
        """Write all that is in the queue, source by source."""
        samples: dict[Source, list[Any]] = {}
        rows, sizes = Counter[Source](), Counter[Source]()
        for _ in range(len(self._queue)):
            source, sample, count, size = self._queue.popleft()
            samples.setdefault(source, []).append(sample)
            rows[source] += count
            sizes[source] += size
        for source, taken in samples.items():
            try:
                self._write(source, taken)
            except Exception as error:
                self._lose(rows[source], error)
            else:
                self.tally.recorded += rows[source]
                if self._failing:
                    self._failing = False
                    log.warning("recording into %s goes on", self.folder)
            with self._lock:
                self._waiting -= sizes[source]

    def _write(self, source: Source, samples: Sequence[Any]) -> None:
        pieces = []
        for first in range(0, len(samples), PIECE):
            pieces.append(source.values(samples[first : first + PIECE]))
            time.sleep(PAUSE_S)
        values = {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}
        if source not in self._schemas:
            self._schemas[source] = schema_of(source.columns, {**source.metadata, "writer": self._id})
        batch = batch_of(self._schemas[source], source.columns, {**values, **source.derived(values)})
        size = batch.get_total_buffer_size()
        if size > self._room:
            self._room = max(size, self._limits.reserve_bytes)
            make_room(self.folder, self._room, self._limits)
        self._room -= size
        if source not in self._segments:
            self._segments[source] = Segment(self.folder / source.folder, batch)
        self._segments[source].append(batch, self._notes())

    def _rotate(self) -> None:
        """Close the segments that are large or old."""
        now, limits = time.monotonic(), self._limits
        for source, segment in list(self._segments.items()):
            if segment.size >= limits.segment_bytes or now - segment.began >= limits.segment_s:
                del self._segments[source]
                segment.close(self._notes())

    def _notes(self) -> dict[str, str]:
        return {"lost": str(self.tally.lost.total() - self._lost_before)}

    def _lose(self, rows: int, error: Exception) -> None:
        """Count rows that cannot be written; the first of several failures in a row is told."""
        self.tally.lost[DISK] += rows
        if not self._failing:
            self._failing = True
            told = error.strerror if isinstance(error, OSError) else None
            log.error(
                "recording into %s fails (%s): steps go on, and what is lost is counted",
                self.folder,
                told or repr(error),
            )


def _joined(parts: Sequence[Values]) -> Values:
    """Join the values of pieces."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]
