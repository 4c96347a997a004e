"""Evidence of a promotion: in the audit line, in the status, and kept with the version while it is current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.serve.admin import _one_line
from omcda_deploy.serve.repository import CURRENT, Repository
from omcda_deploy.serve.status import RequestError
from tests.support.bundles import discrete_spec, write_test_bundle
from tests.support.server_process import free_port, server_process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for version in ("2", "10"):
        write_test_bundle(tmp_path / version, discrete_spec(), seed=int(version))
    return tmp_path


def test_evidence_outlives_a_restart_and_is_told_when_it_is_replaced(folder: Path) -> None:
    why = {"low": 0.5, "dataset": "ab" * 32}

    def served(log: str) -> tuple[str, str, str]:
        port = free_port()
        with (
            server_process(folder, "agent_0", options=("--admin-port", str(port)), log=folder / log),
            TeamAdmin([f"127.0.0.1:{port}"]) as admin,
        ):
            if log == "first":
                admin.switch("2", evidence=json.dumps(why, indent=1))
            (status,) = admin.status().values()
            if log == "second":
                admin.rollback()
        return status.current, status.previous, status.evidence

    assert served("first") == ("2", "10", json.dumps(why))
    assert (folder / CURRENT).read_text() == f"2\n10\n{json.dumps(why)}\n"
    assert served("second") == ("2", "10", json.dumps(why))
    assert f"OK, version 2 answers, promoted on {json.dumps(why)}" in (folder / "first").read_text()
    back = f"OK, version 10 answers, in place of one promoted on {json.dumps(why)}"
    assert back in (folder / "second").read_text()
    assert (folder / CURRENT).read_text() == "10\n2\n"


@pytest.mark.parametrize(
    "evidence", ["no JSON", "[1]", "3", '{"a": ', "[" * 3000, json.dumps({"a": "b" * 5000})]
)
def test_evidence_that_is_no_object_is_refused(evidence: str) -> None:
    with pytest.raises(RequestError, match="evidence: expected"):
        _one_line(evidence)


def test_evidence_is_that_of_the_version_that_is_noted(folder: Path) -> None:
    repository = Repository(folder)
    assert repository.evidence("2") == ""
    repository.write_current("2", "", "{}")
    assert repository.begin() == ("2", "")
    assert [repository.evidence(version) for version in ("2", "10")] == ["{}", ""]
    repository.write_current("10", "2")
    assert repository.evidence("10") == ""
