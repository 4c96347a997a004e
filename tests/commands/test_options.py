"""Options that several commands share, and the entry point itself."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

import pytest
import typer
from rich.markup import render
from typer.testing import CliRunner

import omcda_deploy
from omcda_deploy import cli
from omcda_deploy.commands import Reward, addresses, named_values, simulator_options
from omcda_deploy.errors import ConfigError


def test_ranges_of_ports_are_expanded() -> None:
    assert addresses("a:1, b:5-7 ,,[::1]:9") == ["a:1", "b:5", "b:6", "b:7", "[::1]:9"]
    assert addresses("unix:/tmp/x-y") == ["unix:/tmp/x-y"]  # a hyphen alone is no range
    assert addresses("") == []
    with pytest.raises(ConfigError, match="from the lower to the higher, got 7 to 5"):
        addresses("b:7-5")


def test_simulators_get_only_the_options_of_the_user() -> None:
    assert simulator_options(None, None) == {}
    assert simulator_options("bin/python", None) == {"python": "bin/python"}
    assert simulator_options(None, None, Reward.sum) == {"reward": "sum"}


def test_values_by_name_are_collected_and_others_refused() -> None:
    assert named_values("--set", ["lr=1e-3", "a=b=c"], d_tot="1") == {"lr": "1e-3", "a": "b=c", "d_tot": "1"}
    assert named_values("--set", None, d_tot=None) == {}
    with pytest.raises(ConfigError, match="--set: expected name=value, got 'lr'"):
        named_values("--set", ["lr"])
    with pytest.raises(
        ConfigError, match="--set: expected lr once, got '1e-3' and '2': leave one of them out"
    ):
        named_values("--set", ["lr=1e-3", "lr=2"])
    with pytest.raises(
        ConfigError, match="expected --d-tot or --set d_tot=, got both: leave one of them out"
    ):
        named_values("--set", ["d_tot=2"], d_tot="1")


@pytest.mark.parametrize("command", ["sweep", "results"])
def test_a_negative_number_of_processes_is_refused(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "none.toml", "--out", "none", "--jobs", "-1"])
    assert result.exit_code == 2
    assert "--jobs" in result.output


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["omcda-deploy", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{omcda_deploy.__version__}\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("steps: expected 1"), 2, "error: steps: expected 1\n"),
        (
            ModuleNotFoundError("no", name="torch"),
            2,
            "error: torch is not installed: run  pip install 'omcda-deploy[all]'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: not enough memory (the system refused): ask for less at once\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "d.hdf5"),
            2,
            "error: d.hdf5 cannot be used (No space left on device): free some space, or choose another place\n",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            2,
            "error: the system refused (Too many open files): raise  ulimit -n, or ask for fewer processes and "
            "connections\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "run"),
            2,
            "error: run cannot be used (Permission denied): choose another place\n",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            2,
            "error: the system refused (Disk quota exceeded): free some of your quota, or choose another place\n",
        ),
        (
            OSError("a message\nof two lines"),
            2,
            "error: the system refused (a message of two lines): choose another place\n",
        ),
    ],
)
def test_errors_are_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == status
    assert capsys.readouterr() == ("", line)


def test_a_missing_module_of_this_package_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ModuleNotFoundError("no", name="omcda_deploy.absent")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def helps(command: object, path: str) -> Iterator[tuple[str, str | None]]:
    """Yield all commands and their options with their help texts."""
    yield path, getattr(command, "help", None)
    for option in getattr(command, "params", []):
        yield f"{path} {option.name}", getattr(option, "help", None)
    for name, child in getattr(command, "commands", {}).items():
        yield from helps(child, f"{path} {name}")


def test_everything_has_a_help_text_that_is_printed_whole() -> None:
    """Words in brackets would be taken for the markup of colours."""
    entries = list(helps(typer.main.get_command(cli.app), "omcda-deploy"))
    assert len(entries) > 200
    assert [path for path, text in entries if not text] == []
    assert [path for path, text in entries if render(text or "").plain != text] == []


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("omcda_deploy.training.behavior.mujoco", "behavior"),
        ("omcda_deploy.training.loop", "train"),
        ("omcda_deploy.commands.benchmark", "train"),
        ("omcda_deploy.export.graph", "export"),
        ("omcda_deploy.serve.introspection", "serve"),
        ("somewhere.else", "all"),
    ],
)
def test_a_missing_package_names_the_smallest_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, extra: str
) -> None:
    """The innermost of our modules decides; others may stand around it."""

    def fail() -> None:
        exec("import absent_package.part", {"__name__": module})

    monkeypatch.setattr(
        cli, "app", lambda **_: exec("fail()", {"__name__": "omcda_deploy.serve.x", "fail": fail})
    )
    with pytest.raises(SystemExit):
        cli.main()
    expected = "serve" if extra == "all" else extra
    line = f"error: absent_package is not installed: run  pip install 'omcda-deploy[{expected}]'\n"
    assert capsys.readouterr().err == line
