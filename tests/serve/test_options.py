"""Options of a server: one dataclass for three command lines."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from omcda_deploy.commands import serve as command
from omcda_deploy.errors import ConfigError
from omcda_deploy.serve import server, supervisor
from omcda_deploy.serve.options import Listen, ServeOptions
from omcda_deploy.serve.server import main

SOURCE = Path("releases")
LISTEN = Listen("::1", 8500, 9600, 9500, 9700)
EVERYTHING = ServeOptions(
    Path("-a folder=odd"),
    ("agent_0", "team"),
    LISTEN,
    Path("-serve.toml"),
    True,
    True,
    0.1,
    4711,
    "2@da2afe",
    Path("-folder of records"),
)
ONE_AT_A_TIME = [
    *(
        ServeOptions(
            SOURCE, listen=dataclasses.replace(Listen(), **{entry.name: getattr(LISTEN, entry.name)})
        )
        for entry in dataclasses.fields(Listen)
    ),
    *(
        dataclasses.replace(ServeOptions(SOURCE), **{entry.name: getattr(EVERYTHING, entry.name)})
        for entry in dataclasses.fields(ServeOptions)
    ),
]


@pytest.mark.parametrize("options", [ServeOptions(SOURCE), EVERYTHING, *ONE_AT_A_TIME], ids=str)
def test_options_are_parsed_from_their_own_arguments(options: ServeOptions) -> None:
    assert ServeOptions.parse(options.to_argv()) == options


def test_every_field_differs_from_its_default_in_the_examples() -> None:
    """Without this a new field would be left out of the test above."""
    for example, default in ((EVERYTHING, ServeOptions(SOURCE)), (LISTEN, Listen())):
        for entry in dataclasses.fields(example):
            assert getattr(example, entry.name) != getattr(default, entry.name), entry.name


def test_options_that_are_separate_words_are_parsed_too() -> None:
    words = ["releases", "--model", "agent_0", "--model", "agent_1", "--port", "8500", "--grace", "2"]
    options = ServeOptions.parse(words)
    assert options == ServeOptions(SOURCE, ("agent_0", "agent_1"), Listen(port=8500), grace_s=2.0)


def test_unknown_options_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["releases", "--prot", "1"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --prot" in capsys.readouterr().err


def test_the_command_has_every_option_of_a_server() -> None:
    """``--demo`` is a source, ``--agent`` and ``--team`` are models; only a supervisor names itself and a pin."""
    entries = (*dataclasses.fields(ServeOptions), *dataclasses.fields(Listen))
    names = {entry.name for entry in entries} - {"source", "models", "listen", "supervisor", "pin"}
    parameters = set(inspect.signature(command.serve).parameters)
    assert {name.removesuffix("_s") for name in names} <= parameters
    assert parameters - names == {"bundle", "demo", "agent", "team", "base_port", "grace"}


def test_the_command_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeOptions] = []
    monkeypatch.setattr(server, "serve", started.append)
    monkeypatch.setattr(supervisor, "serve_team", started.append)
    values = {
        "host": "::1",
        "admin_port": 9500,
        "metrics_port": 9600,
        "health_port": 9700,
        "config": Path("serve.toml"),
        "trace": True,
        "log_json": False,
        "grace": 2.0,
    }
    command.serve(SOURCE, agent="agent_1", port=8600, **values)  # type: ignore[arg-type]
    command.serve(SOURCE, team=True, **values)  # type: ignore[arg-type]
    command.serve(SOURCE, base_port=8700, **values)  # type: ignore[arg-type]
    listen = Listen("::1", 8600, 9600, 9500, 9700)
    first = ServeOptions(SOURCE, ("agent_1",), listen, Path("serve.toml"), trace=True, grace_s=2.0)
    assert started == [
        first,
        dataclasses.replace(first, models=("team",), listen=dataclasses.replace(listen, port=8500)),
        dataclasses.replace(first, models=(), listen=dataclasses.replace(listen, port=8700)),
    ]


def test_a_port_of_the_other_way_of_serving_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="expected --base-port, as each agent has a process, got --port 8600"
    ):
        command.serve(SOURCE, port=8600)
    with pytest.raises(ConfigError, match="expected --port with --agent or --team, got --base-port 8600"):
        command.serve(SOURCE, team=True, base_port=8600)


def test_ports_are_shifted_and_absent_ones_stay_absent() -> None:
    assert LISTEN.shifted(2) == Listen("::1", 8502, 9602, 9502, 9702)
    assert Listen(port=8500).shifted(1) == Listen(port=8501)
