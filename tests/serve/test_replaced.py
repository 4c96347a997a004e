"""A version that is held while its folder gets another bundle: no change succeeds and means the other one."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.errors import EndpointError
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.repository import CURRENT
from omcda_deploy.serve.status import StateError
from tests.serve.test_releases import SPEC, copies, folder, held, served
from tests.support.bundles import write_test_bundle

__all__ = ["folder"]


def replace(version: Path, seed: int) -> str:
    """Put another bundle in a version's place, and return its digest."""
    shutil.rmtree(version)
    return write_test_bundle(version, SPEC, seed=seed).digest


def test_what_is_held_and_what_is_on_disk_must_be_one_bundle(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        for version in ("1", "2"):
            await releases.load(version)
        await releases.switch("2")
        before = releases.models("1").digest
        replaced = replace(folder / "1", 99)
        changes: tuple[Any, ...] = (releases.load, releases.switch, releases.set_shadow)
        for change in changes:
            with pytest.raises(
                StateError,
                match=f"version 1 is held as bundle {before[:12]} and is {replaced[:12]} on disk: unload it first",
            ):
                await change("1")
        replace(folder / "2", 98)
        with pytest.raises(StateError, match="version 2 is held as"):
            await releases.switch("2")  # the one that answers
        assert (releases.current, releases.shadow, (folder / CURRENT).read_text()) == ("2", "", "2\n10\n")
        shutil.rmtree(folder / "1")
        with pytest.raises(StateError, match="and is no bundle on disk"):
            await releases.switch("1")
        await releases.switch("1", as_held=True)  # in an emergency
        assert (releases.current, releases.models().digest) == ("1", before)
        assert "and is no bundle on disk, which the next start would read: restore it" in caplog.text
        await releases.switch("2", as_held=True)  # away from one that is gone
        added = write_test_bundle(folder / "1", SPEC, seed=97).digest
        await releases.unload("1")
        await releases.load("1")
        await releases.switch("1")
        assert releases.models().digest == added

    asyncio.run(run())


def test_no_rollback_goes_to_a_bundle_that_never_answered(folder: Path) -> None:
    """The previous version is not held any more, and its folder has another bundle."""

    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        await releases.load("2")
        await releases.switch("2")
        await releases.unload("10")
        replaced = replace(folder / "10", 99)
        with pytest.raises(
            StateError, match=f"when it answered, is not held any more and is {replaced[:12]} on disk"
        ):
            await releases.load("10", as_held=True)
        assert held(releases) == ["2"]
        await releases.load("10")
        await releases.switch("10")  # by its number
        assert releases.models().digest == replaced

    asyncio.run(run())


def test_half_a_switch_is_undone_whatever_is_on_disk(folder: Path) -> None:
    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        await releases.load("2")
        await releases.switch("2", change="a switch")
        replace(folder / "10", 99)
        await releases.switch("10", previous="", undoes="a switch")
        assert (releases.current, held(releases)) == ("10", ["2", "10"])

    asyncio.run(run())


def test_a_team_holds_one_bundle_and_rollback_says_what_is_on_disk(folder: Path, tmp_path: Path) -> None:
    folders = copies(folder, tmp_path)
    replace(folders["agent_1"] / "1", 99)
    with served(folders, tmp_path) as team, TeamAdmin(team.admin) as admin:
        with pytest.raises(
            EndpointError, match=r"expected one bundle as version 1 on all servers, got .* unload"
        ):
            admin.switch("1")
        for status in admin.status().values():
            assert (status.current, [v.version for v in status.versions]) == ("10", ["10"])
        admin.switch("2")
        for place in folders.values():
            replaced = replace(place / "10", 98)
        with pytest.raises(EndpointError, match="FAILED_PRECONDITION: version 10 is held as bundle"):
            admin.switch("10")
        assert {status.current for status in admin.status().values()} == {"2"}
        before = {v.bundle_digest for s in admin.status().values() for v in s.versions if v.version == "10"}
        words = ["--admin", ",".join(team.admin)]
        result = CliRunner().invoke(app, ["release", "rollback", *words], catch_exceptions=False)
        assert result.exit_code == 0
        (digest,) = before
        for endpoint in team.admin:
            assert (
                f"{endpoint} holds version 10 as bundle {digest[:12]}, on disk it is {replaced[:12]}: restore it"
            ) in " ".join(result.output.split())
        assert f"10 {digest[:12]}" in result.output
