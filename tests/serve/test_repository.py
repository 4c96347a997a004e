"""The note of the current version: written once, changed by switches alone, believed by servers that come back."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy.errors import BundleError, ConfigError
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.repository import CURRENT, Pin, Repository
from tests.support.bundles import continuous_spec, write_test_bundle

SPEC = continuous_spec(agents=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Versions 1, 2 and 10 of one team."""
    for version in ("1", "2", "10"):
        write_test_bundle(tmp_path / version, SPEC, seed=int(version))
    return tmp_path


def test_a_damaged_version_is_not_noted(folder: Path) -> None:
    (folder / "10" / "agent_0" / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="was changed after export"):
        Releases(folder, (), ServerConfig())
    assert not (folder / CURRENT).exists()


def test_a_folder_that_cannot_be_written_has_to_say_which_version_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next start would have to guess. Permissions do not bind root, so writing fails otherwise."""

    usual = Path.open

    def refuse(path: Path, mode: str = "r", *options: Any, **more: Any) -> Any:
        if mode == "x":
            raise PermissionError(13, "Permission denied")
        return usual(path, mode, *options, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ConfigError, match=r"current cannot be written \(Permission denied\): .* into this file"
    ):
        Releases(folder, (), ServerConfig())
    (folder / CURRENT).write_text("2\n")
    assert Releases(folder, (), ServerConfig()).current == "2"


def test_servers_that_start_together_agree(folder: Path) -> None:
    """One creates the file; another one reads it before it is written, or while a higher version is copied."""
    repository = Repository(folder)
    (folder / CURRENT).touch()
    writer = threading.Timer(0.1, (folder / CURRENT).write_text, ["2\n\n"])
    writer.start()
    assert repository.begin() == ("2", "")
    writer.join()


def test_a_supervised_server_comes_back_as_what_it_was(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happens to the folder meanwhile: no file, a damaged file, another bundle under the same number."""
    repository = Repository(folder)
    (folder / CURRENT).write_text("2\n1\n")
    pin = repository.pin()
    assert pin == Pin("2", repository.digest("2"), "1")
    assert Pin.parse(str(pin)) == pin
    assert Pin.parse("2@digest") == Pin("2", "digest", "")  # without a previous one
    (folder / CURRENT).unlink()
    assert Releases(folder, (), ServerConfig(), pin).current == "2"
    (folder / CURRENT).write_text("no version")
    assert Releases(folder, (), ServerConfig(), pin).current == "2"
    assert "Version 2 goes on" in caplog.text
    (folder / CURRENT).write_text("10\n2\n")  # a switch since, of other servers
    again = Releases(folder, (), ServerConfig(), pin)
    assert (again.current, again.previous, again.pin) == ("2", "1", pin)
    assert "current says 10. Version 2 goes on, as in its team" in caplog.text
    shutil.rmtree(folder / "1")
    assert Releases(folder, (), ServerConfig(), pin).previous == ""
    shutil.rmtree(folder / "2")
    write_test_bundle(folder / "2", SPEC, seed=99)
    with pytest.raises(BundleError, match=r"version 2 of .* was bundle \w{12} and is \w{12} now: restore it"):
        Releases(folder, (), ServerConfig(), pin)
