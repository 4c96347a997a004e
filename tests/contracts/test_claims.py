"""Claims on paths: one writer at a time (tests/training/test_run_lock.py has more)."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omcda_deploy.claims import ClaimedError, claimed, lock_path, require_unclaimed


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "d.hdf5"
    code = "import sys; from pathlib import Path; from omcda_deploy.claims import claimed\n"
    code += "with claimed(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        expected = f"{path} is being written by process {other.pid}: wait for it, or choose another place"
        with pytest.raises(ClaimedError) as raised, claimed(path):
            pass
        assert str(raised.value) == expected
        with pytest.raises(ClaimedError, match=f"process {other.pid}"):
            require_unclaimed(path)
        other.kill()
        other.wait()
    with claimed(path):
        assert lock_path(path).read_text().split()[0] == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_files_are_written_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path / "d.hdf5"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=os.strerror(number)), claimed(tmp_path / "run", required=True):
        pass


def test_a_claim_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), claimed(tmp_path / "absent" / "d.hdf5"):
        pass
