"""Files that are followed: what changes is read, and what cannot be read leaves the last contents."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from omcda_deploy.errors import ConfigError
from omcda_deploy.followed import FollowedFile


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("omcda_deploy.followed.LOOK_S", 0.0)
    (tmp_path / "file").write_text("a")
    return tmp_path / "file"


def test_a_file_that_is_replaced_or_gone(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    def read(path: Path) -> str:
        try:
            return path.read_text()
        except OSError as error:
            raise ConfigError("gone") from error

    followed = FollowedFile(file, read)
    stat = file.stat()
    (file.parent / "new").write_text("b")
    os.utime(file.parent / "new", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    (file.parent / "new").replace(file)  # same size and time, another file
    assert followed.contents == "b"
    file.unlink()
    assert [followed.contents for _ in range(3)] == ["b"] * 3
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "gone; the last contents stay"
    ]
    file.write_text("cc")
    assert followed.contents == "cc"
    with pytest.raises(ConfigError, match="gone"):
        FollowedFile(file.parent / "absent", read)


def test_what_could_not_be_read_is_tried_again(file: Path) -> None:
    fails = False

    def read(path: Path) -> str:
        if fails:
            raise ConfigError("no access")
        return path.read_text()

    followed = FollowedFile(file, read)
    file.write_text("bb")
    fails = True
    assert followed.contents == "a"
    fails = False
    assert followed.contents == "bb"
