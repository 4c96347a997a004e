"""Files on the user's disk: written whole or not at all, their digests, TOML, and the cache folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from omcda_deploy.errors import ConfigError

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some of your quota, or choose another place",
    errno.EFBIG: "raise  ulimit -f, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise  ulimit -n, or ask for fewer processes and connections",
    errno.ENFILE: "end other programs, or have the system's limit raised",
    errno.ENOMEM: "end other programs, or ask for less at once",
    errno.EAGAIN: "another process holds it: wait for it, and try again",
    errno.EIO: "look at the system's log: the disk may be failing",
}


def refusal(error: OSError) -> str:
    """Say why the system refused and what to do next, as ``(No space left on device): free some space, …``."""
    said = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"({said}): {_ADVICE.get(error.errno or 0, 'choose another place')}"


def require_writable(path: Path, size: int = 4096) -> None:
    """Raise :class:`ConfigError` unless a file or folder can be written at ``path``, before time is spent on it.

    Folders above it may be missing, as :func:`folder_of` makes them; a folder that exists is to be written into.
    ``size``: bytes that will be written at least.
    """
    try:
        if not is_stream(path):
            probe(_named(path), size)
        elif not path.is_fifo():  # which would wait for a reader
            path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"cannot write {path} {refusal(error)}") from error


def is_stream(path: Path) -> bool:
    """Test if a path names a pipe, a device or an open file of this process, as ``/dev/stdout`` does.

    They take bytes, and no file can take their place.
    """
    folder = os.path.realpath(path.parent)
    if path.is_symlink() and (folder == "/dev" or folder.startswith("/proc/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _named(path: Path) -> Path:
    """Return the file that a symbolic link names, which is what is written, as the shell would."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def probe(path: Path, size: int = 4096) -> None:
    """Write some bytes to where ``path`` is to be; raises :class:`OSError` as :func:`require_writable` describes.

    Access rights alone tell nothing about space and quotas.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < size:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    place = path.absolute()
    anchor = place if place.is_dir() else next(folder for folder in place.parents if os.path.lexists(folder))
    with tempfile.TemporaryFile(dir=anchor) as file:
        file.write(bytes(4096))
    if shutil.disk_usage(anchor).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def folder_of(path: Path) -> Iterator[None]:
    """Make the folders above ``path``; when the block fails, remove those that were made and are empty.

    Raises :class:`OSError` where they cannot be made.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # also one that somebody else has filled meanwhile
                folder.rmdir()
        raise


@contextmanager
def atomic(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block succeeds.

    When the block fails, the temporary is removed and ``path`` stays as it was. The temporary ends in the same
    suffix, which some writers (numpy, imageio) look at. The file gets the permissions that a plain ``open`` would
    give it: those of the file it replaces, else those of the umask. A symbolic link stays, and the file that it
    names is replaced; a pipe or a device (:func:`is_stream`) takes the content once it is whole.

    ``durable``: flush the content to the disk first, so that ``path`` holds the old or the new content even after
    a power cut; slow for large files. Raises :class:`OSError` as the writing itself does.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / f"content{path.suffix}"
            yield whole
            with whole.open("rb") as content, path.open("ab") as stream:
                shutil.copyfileobj(content, stream)
        return
    path = _named(path)
    # Not the process id: servers in several containers may share a folder and have one process id.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is moved to ``path`` when the block succeeds, and removed when it fails.

    Makes the folders above ``path`` as :func:`folder_of` does. Raises :class:`OSError` where it cannot be written,
    and where ``path`` exists and is not an empty folder.
    """
    with folder_of(path), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch).absolute() / path.name  # the scratch folder itself is private to this user
        folder.mkdir()
        yield folder
        folder.rename(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file, or leave the one that is there.

    Raises :class:`ConfigError` where it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file, as :func:`write_text` does."""
    try:
        with atomic(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path} {refusal(error)}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON as :func:`write_text` does.

    Raises :class:`ValueError` for NaN and infinity, which are not JSON.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_toml(path: Path, content: str) -> dict[str, Any]:
    """Parse a TOML file; ``content`` names what should be in it, for the message.

    Raises :class:`ConfigError` for a file that does not exist or is not TOML.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {state}: expected {content} (TOML)")
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:  # also for bytes that are not text
        raise ConfigError(f"{path} is not TOML: {error}") from error


def cache_folder() -> Path:
    """Folder for files that can be computed again: ``$OMCDA_CACHE``, else ``~/.cache/omcda-deploy``."""
    return Path(os.environ.get("OMCDA_CACHE") or Path.home() / ".cache" / "omcda-deploy")


@contextmanager
def cached(name: str) -> Iterator[Path]:
    """Yield the path of the cache file ``name``, which the block reads, or makes where it is not there yet.

    Processes that start together wait here for the first, which makes it for all of them; the system drops the lock
    of one that is killed. Raises :class:`ConfigError` at once where it is not there and cannot be written.
    """
    path = cache_folder() / name
    with ExitStack() as stack:
        try:
            with folder_of(path):
                if not path.is_file():
                    probe(path)
                lock = stack.enter_context(path.with_suffix(".lock").open("w"))
        except OSError as error:
            if not path.is_file():  # files of a cache that cannot be written are whole, too
                raise ConfigError(
                    f"the cache {cache_folder()} cannot be written ({error.strerror}): set OMCDA_CACHE to another "
                    "folder, or free some space"
                ) from error
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
