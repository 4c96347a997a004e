"""Exports shared by the tests of a file."""

from __future__ import annotations

import pytest

from omcda_deploy.spec import TeamSpec
from tests.support.exported import Export, Exported


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export each team once for the tests that only act with it."""
    folder = tmp_path_factory.mktemp("bundles")
    exports: dict[tuple[TeamSpec, str], Exported] = {}

    def get(spec: TeamSpec, kind: str = "kl") -> Exported:
        if (spec, kind) not in exports:
            exports[spec, kind] = Exported(folder / str(len(exports)), spec, kind)
        return exports[spec, kind]

    return get
