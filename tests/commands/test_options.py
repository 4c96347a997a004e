"""Options that several commands share, and the entry point itself."""

from __future__ import annotations

import sys

import pytest
import typer
from typer.testing import CliRunner

import omcda_deploy
from omcda_deploy import cli
from omcda_deploy.commands import addresses, named_values, simulator_options
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


def test_values_by_name_are_collected_and_others_refused() -> None:
    assert named_values("--set", ["lr=1e-3", "a=b=c", "lr=2"]) == {"lr": "2", "a": "b=c"}
    assert named_values("--set", None) == {}
    with pytest.raises(ConfigError, match="--set: expected name=value, got 'lr'"):
        named_values("--set", ["lr"])


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
    ],
)
def test_errors_are_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == status
    assert capsys.readouterr() == ("", line)


def test_a_missing_module_of_this_package_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("no", name="omcda_deploy.absent")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_every_command_has_a_help_text() -> None:
    def commands(command: object, path: str) -> list[tuple[str, str | None]]:
        group: dict[str, object] = getattr(command, "commands", {})
        nested = [entry for name, child in group.items() for entry in commands(child, f"{path} {name}")]
        return nested or [(path, getattr(command, "help", None))]

    entries = commands(typer.main.get_command(cli.app), "omcda-deploy")
    assert len(entries) > 20
    assert [path for path, text in entries if not text] == []
