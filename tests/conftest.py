"""Bundles, servers and other processes that several files share; started once per session."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest

from omcda_deploy.bundle import TEAM, Bundle
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle
from tests.support.fork_server import fork_server
from tests.support.server_process import ServerProcess, server_process

# As the Makefile does, before anything imports torch: with networks of this size a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all is imported: the collector would look at torch's and JAX's objects again and again


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that run in this process log to a stream of their test, which is closed afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def continuous_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("continuous") / "bundle", continuous_spec(), seed=1)


@pytest.fixture(scope="session")
def discrete_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("discrete") / "bundle", discrete_spec(), seed=2)


@pytest.fixture(scope="session")
def continuous_server(continuous_bundle: Bundle) -> Iterator[ServerProcess]:
    """All agents of the continuous bundle in one process."""
    with server_process(continuous_bundle, *continuous_bundle.spec.names) as server:
        yield server


@pytest.fixture(scope="session")
def discrete_server(discrete_bundle: Bundle) -> Iterator[ServerProcess]:
    with server_process(discrete_bundle, *discrete_bundle.spec.names) as server:
        yield server


@pytest.fixture(scope="session")
def joint_server(continuous_bundle: Bundle) -> Iterator[ServerProcess]:
    """The continuous bundle's joint graph alone."""
    with server_process(continuous_bundle, TEAM) as server:
        yield server


@pytest.fixture(scope="session")
def forking() -> Iterator[ForkServerContext]:
    """Processes that start with torch imported."""
    with fork_server() as context:
        yield context
