"""Files are written whole or not at all, with the permissions and the digest that other tools expect."""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from omcda_deploy import files
from omcda_deploy.errors import ConfigError


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_when_the_block_succeeds(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "video.mp4"
    with files.atomic(path, durable=durable) as temporary:
        assert temporary.parent == path.parent  # a rename within one file system
        assert temporary.name.startswith(".video.mp4.")
        assert temporary.suffix == ".mp4"
        temporary.write_text("frames")
        assert not path.exists()
    assert path.read_text() == "frames"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "state.pt"
    path.write_text("old")

    def write() -> None:
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "state.pt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), files.atomic(path, durable=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    for name, target in (("link", "target"), ("dangling", "new")):
        (tmp_path / name).symlink_to(target)
        files.require_writable(tmp_path / name)
        files.write_text(tmp_path / name, "content")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_text() == "content"
    (tmp_path / "nowhere").symlink_to("missing/file")
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere"):
        files.write_text(tmp_path / "nowhere", "content")


def test_pipes_and_devices_take_the_content_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.require_writable(pipe)  # waits for no reader
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()
    files.require_writable(Path(os.devnull))
    files.write_text(os.devnull, "content")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_what_a_process_prints_to_takes_content_as_a_file_does(tmp_path: Path, place: str) -> None:
    lines = (
        "from omcda_deploy import files",
        "print('before', flush=True)",
        f"files.write_text('{place}', 'x')",
    )
    program = [sys.executable, "-c", "; ".join(lines)]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "before\nx"
    with (tmp_path / "output").open("w") as output:
        subprocess.run(program, stdout=output, check=True)
    assert (tmp_path / "output").read_text() == "before\nx"


def test_two_writers_at_once_do_not_share_a_temporary(tmp_path: Path) -> None:
    path = tmp_path / "current"
    with files.atomic(path) as first, files.atomic(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_a_plain_open(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        for name in ("plain", "atomic"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "plain").write_text("")
        files.write_text(tmp_path / "atomic", "")
        (tmp_path / "secret").touch(mode=0o600)
        files.write_text(tmp_path / "secret", "token")
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"plain": 0o666 & ~umask, "atomic": 0o666 & ~umask, "secret": 0o600}


def test_text_and_json_are_utf_8_and_end_in_a_line_break(tmp_path: Path) -> None:
    files.write_text(str(tmp_path / "text"), "π\n")
    assert (tmp_path / "text").read_bytes() == "π\n".encode()
    files.write_json(tmp_path / "json", {"a": [1, 0.5]})
    assert (tmp_path / "json").read_text() == '{\n "a": [\n  1,\n  0.5\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "json", {"a": math.nan})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*absent/x \(No such file or directory\): choose"):
        files.write_text(tmp_path / "absent" / "x", "")
    with pytest.raises(ConfigError, match="cannot write"):
        files.write_json(tmp_path, {})


def test_sha256_is_that_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(3_000_000))
    printed = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout
    assert files.sha256(path) == printed.split()[0]


def test_a_place_is_tried_before_time_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.require_writable(tmp_path / "new" / "folder" / "x")
    files.require_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file/x \(Not a directory\): choose another place"):
        files.require_writable(tmp_path / "file" / "x")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ConfigError, match=r"cannot write .*x \(No space left on device\): free some space"):
        files.require_writable(tmp_path / "x", size=2 * free + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"cannot write .*x \(Read-only file system\)"):
        files.require_writable(tmp_path / "x")


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError, match="stop"), files.atomic_folder(place) as folder:  # noqa: PT012
        (folder / "x").touch()
        assert not place.exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(place) as folder:
        (folder / "x").touch()
    assert [path.name for path in place.iterdir()] == ["x"]
    assert [path.name for path in place.parent.iterdir()] == ["b"]


def test_a_cache_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are read all the same."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    with files.cached("kind/made") as path:
        path.write_text("made")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with files.cached("kind/made") as path:
        assert path.read_text() == "made"
    message = (
        r"the cache .*cache cannot be written \(Read-only file system\): set OMCDA_CACHE to another folder"
    )
    with pytest.raises(ConfigError, match=message), files.cached("other/absent"):
        pass
    assert not (tmp_path / "cache" / "other").exists()
    monkeypatch.setattr(Path, "open", refuse)
    with files.cached("kind/made") as path:
        assert path.is_file()
