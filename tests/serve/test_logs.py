"""Logs of a supervised team from the command line: every line of JSON is JSON, every line of text has its time."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omcda_deploy.bundle import Bundle
from tests.serve.test_security import Authority
from tests.serve.test_supervisor import agent_process, wait_for
from tests.support.server_process import free_ports

SERVE = [sys.executable, "-m", "omcda_deploy.cli", "serve"]


def log_of_a_team(bundle: Bundle, *options: str, disturb: bool = False) -> list[str]:
    """Run a team, kill one server, stop all; returns the lines on stderr. ``disturb``: knock at its TLS first."""
    base = free_ports(2)
    command = [*SERVE, str(bundle.path), "--base-port", str(base), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline().startswith("serving ")
        if disturb:
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", base)) as knock:
                    knock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    knock.recv(100)
        os.kill(agent_process(process.pid, "agent_0"), signal.SIGKILL)
        if disturb:
            time.sleep(0.5)
        else:
            wait_for(f"127.0.0.1:{base}", "agent_0")
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    return errors.splitlines()


def test_json_logs_are_json_to_the_last_line(discrete_bundle: Bundle, tmp_path: Path) -> None:
    Authority(tmp_path / "ours")
    config = tmp_path / "serve.toml"
    config.write_text('[tls]\ncertificate = "ours/server.pem"\nkey = "ours/server.key"\n')
    options = ("--log-json", "--config", str(config))
    lines = [json.loads(line) for line in log_of_a_team(discrete_bundle, *options, disturb=True)]
    assert [line["message"] for line in lines if "exited with status -9" in line["message"]]
    assert all({"time", "level", "logger"} <= line.keys() for line in lines)


def test_text_logs_have_times(discrete_bundle: Bundle) -> None:
    lines = log_of_a_team(discrete_bundle)
    assert any("exited with status -9" in line for line in lines)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in lines), lines


@pytest.mark.parametrize(
    "start", [SERVE, [sys.executable, "-m", "omcda_deploy.serve"]], ids=["command", "module"]
)
def test_an_error_that_ends_a_server_is_a_line_of_its_log(tmp_path: Path, start: list[str]) -> None:
    for options in (["--log-json"], []):
        done = subprocess.run([*start, str(tmp_path), *options], capture_output=True, text=True, timeout=30)
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (2, "")
        message = json.loads(line)["message"] if options else line.removeprefix("error: ")
        assert message.startswith(f"{tmp_path}: expected a bundle, or a folder of bundles")


@pytest.mark.parametrize(
    "defect",
    [
        "raise ValueError('broken')",
        "threading.Thread(target=lambda: 1 / 0).start()",
        "warnings.warn('a warning')",
    ],
)
def test_defects_are_json_too(defect: str) -> None:
    code = (
        "import threading, warnings\n"
        "from omcda_deploy.serve.logs import configure_logging\n"
        f"configure_logging(json_lines=True)\n{defect}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["level"] in ("CRITICAL", "WARNING")
    assert ("Traceback" in line.get("error", "")) == ("warn(" not in defect)
