"""docs/serving.md: its blocks are run as they stand but for the ports, and its tables hold what the code has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.channel import Credentials
from omcda_deploy.guard import GuardSetting
from omcda_deploy.serve.config import Limits
from omcda_deploy.serve.security import Tls
from omcda_deploy.serve.status import STATUS
from tests.support.bundles import continuous_spec, with_references, write_test_bundle
from tests.support.server_process import free_port, server_process

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def file_name(block: str) -> str:
    """File name in the first line: ``# serve.toml``."""
    return block.splitlines()[0].removeprefix("# ")


def test_the_blocks_run(tmp_path: Path) -> None:
    for version in (1, 2):
        with_references(
            write_test_bundle(tmp_path / "releases" / str(version), continuous_spec(), seed=version)
        )
    lines = ["set -e -o pipefail"]
    for number, (language, text) in enumerate(BLOCKS):
        if language == "toml":
            (tmp_path / file_name(text)).write_text(text)
        elif language == "python":
            lines.append(f"{sys.executable} block{number}.py")
        elif language == "bash":
            lines.append(re.sub(r"&$", "&\nready", text, flags=re.MULTILINE))
    script = "\n".join(lines)
    assert script.count("\nready") == 2
    ready = "ready() { until curl -sf 127.0.0.1:9600/metrics > /dev/null; do kill -0 $!; sleep 0.1; done; }\n"
    ports = {str(port): str(free_port()) for port in (8500, 9500, 9600)}

    def placed(text: str) -> str:
        return re.sub("|".join(ports), lambda found: ports[found[0]], text)

    for number, (language, text) in enumerate(BLOCKS):
        if language == "python":
            (tmp_path / f"block{number}.py").write_text(placed(text))
    process = subprocess.Popen(
        ["bash", "-c", placed(ready + script)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert output.count(f"serving team on 127.0.0.1:{ports['8500']}") == 2, output
    assert (tmp_path / "releases" / "current").read_text() == "2\n1\n"  # switched to 1, and back
    assert 'omcda_answers_total{model="team",version="2"} 1.0' in output


@pytest.mark.parametrize("language", ["bash", "python", "toml"])
def test_there_are_blocks_of_every_kind_that_is_run(language: str) -> None:
    assert any(language == found for found, _ in BLOCKS)
    assert shutil.which("openssl"), "the page's certificates are made with openssl"


def test_the_configuration_shows_every_entry() -> None:
    files = {file_name(text): tomllib.loads(text) for language, text in BLOCKS if language == "toml"}
    values = files["serve.toml"]
    values["guard"].pop("agents")
    access = {"token_file": "tokens", "admin_token_file": "admin-tokens"}
    for table, kind in (("guard", GuardSetting), ("limits", Limits), ("tls", Tls)):
        assert values.pop(table).keys() == {entry.name for entry in dataclasses.fields(kind)}
    assert values == {"releases": {"retire_s": 300.0}, "access": access}
    entries = {entry.name for entry in dataclasses.fields(Credentials)}
    assert files["credentials.toml"].keys() == entries - {"token"} | {"token_file"}


def test_the_status_table_has_every_status() -> None:
    statuses = [status for status, _ in rows("Errors")]
    assert len(set(statuses)) == len(statuses)
    assert set(statuses) <= {code.name for code in grpc.StatusCode}
    others = {"UNAUTHENTICATED", "DEADLINE_EXCEEDED", "INTERNAL"}  # not of the table in status.py
    assert set(statuses) == {code.name for _, code in STATUS} | others


def test_the_metrics_table_has_every_metric_with_its_labels(continuous_bundle: Bundle) -> None:
    port = free_port()
    with (
        server_process(continuous_bundle, "agent_0", options=("--metrics-port", str(port))) as process,
        grpc.insecure_channel(process.endpoint) as channel,
    ):
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=5)  # type: ignore[arg-type]
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    exported: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(("omcda_", "grpc_")):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            exported[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    documented = {}
    labels: set[str] = set()
    for name, cell, _ in rows("Metrics"):
        cell_labels = set(filter(None, cell.removeprefix("and ").split(", ")))
        labels = labels | cell_labels if cell.startswith("and ") else cell_labels
        documented[name] = labels
    assert documented == exported
