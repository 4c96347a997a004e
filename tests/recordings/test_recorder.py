"""The writing thread and its files: slow, full and small disks, and ends that are torn."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.recordings import FORMAT, recorder, segments
from omcda_deploy.recordings.columns import ANY, TEXT, TIME, Column, Values
from omcda_deploy.recordings.reader import SegmentContents, find_segments, read_segment
from omcda_deploy.recordings.recorder import DISK, QUEUE, Recorder
from omcda_deploy.recordings.segments import RecordingLimits, make_room


class Numbers:
    """A source whose samples are numbers."""

    folder = "numbers"
    columns = (
        Column("time", TIME),
        Column("name", TEXT),
        Column("number", "<u8"),
        Column("vector", "<f4", 3),
        Column("list", "u1", ANY),
    )

    def __init__(self, width: int = 3) -> None:
        self.columns = (*Numbers.columns[:3], Column("vector", "<f4", width), Numbers.columns[4])
        self.metadata = {"format": FORMAT, "kind": "test"}
        self._width = width

    def derived(self, values: Mapping[str, Values]) -> Mapping[str, Values]:
        return {"vector": np.repeat(np.array(values["number"])[:, None], self._width, axis=1)}

    def values(self, samples: Sequence[int]) -> Mapping[str, Values]:
        numbers = np.array(samples)
        return {
            "time": numbers,
            "name": [f"näme {number}" for number in samples],
            "number": numbers,
            "list": [np.full(number % 3, number % 256) for number in samples],
        }


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "FLUSH_S", 0.02)


def contents(folder: Path) -> list[SegmentContents]:
    read = [read_segment(path) for path in find_segments([folder])]
    assert None not in read
    return [segment for segment in read if segment is not None]


def numbers_of(folder: Path) -> list[int]:
    return [number for segment in contents(folder) for number in segment.columns["number"].tolist()]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    source, recording = Numbers(), Recorder(tmp_path)
    for number in range(300):
        recording.put(source, number, 1, 0)
    recording.close()
    (segment,) = contents(tmp_path)
    assert (segment.rows, segment.torn, segment.closed, segment.lost) == (300, False, True, 0)
    columns = segment.columns
    assert columns["number"].tolist() == columns["time"].tolist() == list(range(300))
    assert columns["name"][7] == "näme 7"
    assert columns["vector"][299].tolist() == [299.0] * 3
    assert columns["list"][5].tolist() == [5, 5]
    assert recording.tally.recorded == 300


def test_a_torn_tail_is_cut_wherever_it_is_torn(tmp_path: Path) -> None:
    source, recording = Numbers(), Recorder(tmp_path)
    for number in range(40):
        recording.put(source, number, 1, 0)
        if number % 10 == 0:
            wait_for(lambda count=number: recording.tally.recorded > count)
    recording.close()
    (path,) = find_segments([tmp_path])
    whole = path.read_bytes()
    lengths = set()
    for end in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        segment = read_segment(path)
        if segment is None:
            assert end < 2000
            continue
        numbers = segment.columns["number"].tolist()
        assert numbers == list(range(len(numbers)))
        assert not (segment.torn and segment.closed)
        lengths.add((len(numbers), segment.torn))
    assert {torn for _, torn in lengths} == {True, False}
    assert len(lengths) > 5
    path.write_bytes(b"something else")
    with pytest.raises(DatasetError, match="expected a segment of a recording"):
        read_segment(path)


def test_a_disk_that_blocks_delays_nobody_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recording = Numbers(), Recorder(tmp_path)
    recording.put(source, 0, 1, 0)
    wait_for(lambda: recording.tally.recorded)
    blocked, write = threading.Event(), os.write

    def slow(file: int, data: Any) -> int:
        blocked.wait()
        return write(file, data)

    monkeypatch.setattr("omcda_deploy.recordings.segments.os.write", slow)
    many = 2 * recorder.QUEUE_BYTES // recorder.SAMPLE_BYTES
    for number in range(1, many):  # each would wait for ever
        recording.put(source, number, 1, 0)
    lost = recording.tally.lost[QUEUE]
    assert many / 3 < lost < many
    blocked.set()
    recording.close()
    numbers = numbers_of(tmp_path)
    assert numbers == list(range(many - lost))
    assert recording.tally.recorded + lost == many
    assert contents(tmp_path)[-1].lost == lost


def test_a_disk_that_never_answers_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = threading.Event()
    monkeypatch.setattr("omcda_deploy.recordings.segments.os.fsync", lambda file: blocked.wait())
    recording = Recorder(tmp_path)
    recording.put(Numbers(), 0, 1, 0)
    began = time.monotonic()
    recording.close(0.1)
    assert time.monotonic() - began < 2.0
    blocked.set()


def test_a_full_disk_loses_only_what_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, recording = Numbers(), Recorder(tmp_path)
    write, full = os.write, threading.Event()

    def filling(file: int, data: Any) -> int:
        if full.is_set():
            if len(data) > 100:
                return write(file, data[:100])  # so far it goes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr("omcda_deploy.recordings.segments.os.write", filling)
    for first, failing in ((0, False), (10, True), (20, True), (30, False)):
        (full.set if failing else full.clear)()
        done = recording.tally.recorded + recording.tally.lost[DISK]
        for number in range(first, first + 10):
            recording.put(source, number, 1, 0)
        wait_for(lambda before=done: recording.tally.recorded + recording.tally.lost[DISK] == before + 10)
    recording.close()
    (segment,) = contents(tmp_path)
    assert segment.columns["number"].tolist() == [*range(10), *range(30, 40)]
    assert (segment.torn, segment.closed, segment.lost) == (False, True, 20)
    told = [record.getMessage() for record in caplog.records if "recording into" in record.getMessage()]
    assert len(told) == 2, "a failure is told once, and its end"
    assert "No space left" in told[0]


def test_a_defect_in_a_source_costs_its_rows_alone(tmp_path: Path) -> None:
    recording, good = Recorder(tmp_path), Numbers()
    for number in range(5):
        recording.put(good, number, 1, 0)
        recording.put(Numbers(), "no number", 1, 0)
    recording.close()
    assert numbers_of(tmp_path) == list(range(5))
    assert recording.tally.lost[DISK] == 5


def test_all_together_stays_below_the_limit_and_the_oldest_go(tmp_path: Path) -> None:
    limits = RecordingLimits(size_mb=segments.LEAST_MB)
    recordings = [Recorder(tmp_path, limits) for _ in range(2)]  # two processes share a folder
    sources = [Numbers(10_000) for _ in recordings]
    largest, chunk = 0, 5
    for start in range(0, 320, chunk):
        for recording, source in zip(recordings, sources, strict=True):
            before = recording.tally.recorded
            for number in range(start, start + chunk):
                recording.put(source, number, 1, 40_000)
            wait_for(lambda r=recording, b=before: r.tally.recorded + r.tally.lost.total() >= b + chunk)
        largest = max(largest, sum(path.stat().st_size for path in find_segments([tmp_path])))
    for recording in recordings:
        recording.close()
        assert recording.tally.lost.total() == 0
    limit = limits.size_mb * 10**6
    assert 0.8 * limit < largest <= 1.01 * limit
    numbers = numbers_of(tmp_path)
    assert min(numbers) > 100
    assert max(numbers) == 319


def test_open_segments_are_never_removed(tmp_path: Path) -> None:
    limits = RecordingLimits(size_mb=segments.LEAST_MB)
    recording, source = Recorder(tmp_path, limits), Numbers()
    recording.put(source, 1, 1, 0)
    wait_for(lambda: recording.tally.recorded)
    with pytest.raises(OSError, match="open segments alone"):
        make_room(tmp_path, limits.size_mb * 10**6, limits)
    recording.close()
    assert numbers_of(tmp_path) == [1]
    make_room(tmp_path, limits.size_mb * 10**6, limits)
    assert not list(tmp_path.rglob("*.arrows"))


def test_segments_are_closed_when_they_are_old(tmp_path: Path) -> None:
    recording, source = Recorder(tmp_path, RecordingLimits(segment_s=1.0)), Numbers()
    recording.put(source, 0, 1, 0)
    time.sleep(1.1)
    recording.put(source, 1, 1, 0)
    recording.close()
    assert [segment.columns["number"].tolist() for segment in contents(tmp_path)] == [[0], [1]]


def test_recording_imports_neither_pandas_nor_arrows_compute_functions(tmp_path: Path) -> None:
    """Each would stop the steps of a server for a moment, and stay in its memory."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from tests.recordings.test_recorder import Numbers, Recorder\n"
        "sys.modules.pop('pandas', None); before = set(sys.modules)\n"
        "recording = Recorder(Path(sys.argv[1])); source = Numbers()\n"
        "for number in range(5): recording.put(source, number, 1, 0)\n"
        "recording.close()\n"
        "new = set(sys.modules) - before\n"
        "print(recording.tally.recorded, [name for name in ('pandas', 'pyarrow.compute') if name in new])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert result.stdout == "5 []\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_mb": 7}, "size_mb: expected a whole number from 8 on, got 7"),
        ({"size_mb": 10.5}, "size_mb"),
        ({"size_mb": True}, "size_mb"),
        ({"segment_s": 0.5}, "segment_s: expected seconds from 1 on"),
        ({"segment_s": float("nan")}, "segment_s"),
    ],
)
def test_limits_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecordingLimits(**values)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/nowhere")):
        with pytest.raises(ConfigError):
            Recorder(place)
