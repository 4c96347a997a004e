"""HDF5 on disks that are full, and in files that somebody else holds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from omcda_deploy.datasets.hdf5 import DamagedError, Sink, opened
from omcda_deploy.datasets.writer import DatasetWriter, write_dataset
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.registry import read_dataset
from tests.support.episodes import SPECS, random_episode

ROOT = Path(__file__).parents[2]
LIMITED = """
import resource, sys
from omcda_deploy.datasets.writer import write_dataset
from tests.support.episodes import SPECS, random_episode

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
spec = SPECS["continuous"]
write_dataset(sys.argv[1], spec, (random_episode(spec, 1000, seed) for seed in range(200)))
"""


@pytest.mark.parametrize("size", [8192, 300_000, 2_000_000])
def test_a_file_that_outgrows_its_disk_leaves_nothing(tmp_path: Path, size: int) -> None:
    """In a process of its own, which HDF5 would crash at its end."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "new" / "d.hdf5"), str(size)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "d.hdf5 cannot be written (File too large): raise  ulimit -f, or choose another place"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writes", range(0, 30, 3))
def test_a_write_that_fails_at_any_time_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left = writes
    pwrite = os.pwrite

    def fail(*arguments: object) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", fail)
    spec = SPECS["discrete"]
    episodes = (random_episode(spec, 30, seed) for seed in range(8))
    with pytest.raises(
        DatasetError, match=r"d.hdf5 cannot be written \(No space left on device\): free some"
    ):
        write_dataset(tmp_path / "d.hdf5", spec, episodes)
    assert left < 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_full_disk_refused_is_read_back_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 reads what it wrote, before it closes a file."""
    sink = Sink(tmp_path / "file")
    sink.write(b"0123456789")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", fail)
    for position, content in ((4, b"abcd"), (6, b"XY"), (14, b"end")):
        sink.seek(position)
        assert sink.write(content) == len(content)
    assert sink.seek(0, os.SEEK_END) == 17
    sink.seek(2)
    assert sink.read(100) == b"23abXY89\0\0\0\0end"
    sink.truncate(9)
    sink.seek(3)
    assert sink.read(100) == b"3abXY8"
    sink.close()
    with pytest.raises(OSError, match="full"):
        sink.check()
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_one_process_at_a_time_writes_a_dataset(tmp_path: Path) -> None:
    spec = SPECS["continuous"]
    with DatasetWriter(tmp_path / "d.hdf5", spec, {}) as writer:
        writer.append(random_episode(spec, 3))
        message = rf"d.hdf5 is being written by process {os.getpid()}: wait for it"
        with pytest.raises(ConfigError, match=message):
            write_dataset(tmp_path / "d.hdf5", spec, [random_episode(spec, 3)])
    write_dataset(tmp_path / "d.hdf5", spec, [random_episode(spec, 3)])
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]


def test_a_file_that_another_process_writes_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "d.hdf5"
    write_dataset(path, SPECS["continuous"], [random_episode(SPECS["continuous"], 3)])
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'a'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DatasetError, match=r"d\.hdf5 is in use: another process has it open for writing"):
            read_dataset(path)
        other.communicate()
    assert len(read_dataset(path).episode_length) == 1


def lock_refused(number: int) -> OSError:
    said = f"(unable to lock file, errno = {number}, error message = '{os.strerror(number)}')"
    return OSError(f"Unable to synchronously open file {said}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lock_refused(errno.EAGAIN), "is in use: another process has it open for writing"),
        (BlockingIOError(errno.EAGAIN, str(lock_refused(errno.EAGAIN))), "is in use: another process"),
        (lock_refused(errno.ENOLCK), r"cannot be locked .*\(No locks available\): set HDF5_USE_FILE_LOCKING"),
        (PermissionError(errno.EACCES, "Unable to open lock"), r"cannot be read \(Permission denied\)"),
        (OSError(errno.EIO, "read failed"), r"cannot be read \(Input/output error\)"),
        (OSError("file is already open for write (may use h5clear)"), "was not closed by the program that"),
    ],
)
def test_what_the_system_refuses_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(DatasetError, match=message) as raised, opened(tmp_path / "d.hdf5", "copy it again"):
        pass
    assert not isinstance(raised.value, DamagedError)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"text", lambda _: b""])
def test_damage_is_told_as_such(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "d.hdf5"
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(1000)
    path.write_bytes(damage(path.read_bytes()))
    with (
        pytest.raises(DamagedError, match=r"is truncated or not HDF5: copy it again"),
        opened(path, "copy it again"),
    ):
        pass
