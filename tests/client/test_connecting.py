"""Demands of a client on the servers that it connects to: a version of its own, and patience."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import ConfigError, EndpointError, MissedAnswerError
from omcda_deploy.local import LocalTeam
from omcda_deploy.serve.repository import CURRENT
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.server_process import free_port, server_process

SPEC = continuous_spec(agents=2)
ROWS = {a.name: np.full((2, a.observation_size), 0.3, np.float32) for a in SPEC.agents}


def test_a_canary_is_answered_by_its_own_version(tmp_path: Path) -> None:
    for version in ("1", "2"):
        write_test_bundle(tmp_path / version, SPEC, seed=int(version))
    (tmp_path / CURRENT).write_text("1\n2\n")  # both are held
    expected: dict[str, Any] = {v: LocalTeam(tmp_path / v).act(ROWS) for v in ("1", "2")}
    with server_process(tmp_path, *SPEC.names) as server, ExitStack() as stack:
        others = stack.enter_context(RemoteTeam([server.endpoint]))
        canary = stack.enter_context(RemoteTeam([server.endpoint], version="2"))
        robot = stack.enter_context(RemotePolicy(server.endpoint, "agent_1", version="2"))
        for _ in range(2):  # episodes
            for team, version in ((others, "1"), (canary, "2")):
                assert team.version == version
                for name, decision in team.act(ROWS).items():
                    np.testing.assert_allclose(decision.action, expected[version][name].action, atol=1e-6)
            action = robot.act(ROWS["agent_1"]).action
            np.testing.assert_allclose(action, expected["2"]["agent_1"].action, atol=1e-6)
            for client in (others, canary, robot):
                client.reset()
        assert canary.bundle_digest != others.bundle_digest
        with canary.pinned():
            assert canary.version == "2"
        for connect in (RemotePolicy, RemoteTeam):
            with pytest.raises(EndpointError, match=f"{server.endpoint}: .*NOT_FOUND: unknown version '9'"):
                connect(server.endpoint, version="9")
            for wrong in ("", 2):
                with pytest.raises(ConfigError, match=f"version: expected its name, .* got {wrong!r}"):
                    connect(server.endpoint, version=wrong)  # type: ignore[arg-type]


def test_a_client_may_wait_until_its_servers_are_ready(continuous_bundle: Bundle) -> None:
    port, stop = free_port(), threading.Event()

    def serve() -> None:
        time.sleep(0.3)
        with server_process(continuous_bundle, options=("--port", str(port))):
            stop.wait(30)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(MissedAnswerError, match="cannot be reached"):
            RemoteTeam(f"127.0.0.1:{port}")
        with RemoteTeam(f"127.0.0.1:{port}", wait_s=30.0) as team:
            assert team.spec == continuous_bundle.spec
    finally:
        stop.set()
        thread.join()


def test_a_slow_link_is_no_missing_server(continuous_bundle: Bundle) -> None:
    with (
        server_process(continuous_bundle, "agent_0") as server,
        slow_link(server.endpoint, 0.15) as link,
        RemotePolicy(link, deadline_s=2.0) as policy,
    ):
        policy.act(np.ones((1, 4), np.float32))
        assert policy.latency is not None
        assert policy.latency > 0.3


@contextmanager
def slow_link(endpoint: str, delay_s: float) -> Iterator[str]:
    """Yield the address of a proxy that passes bytes on after ``delay_s`` seconds, in each direction."""

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(1 << 16):
                loop.call_later(delay_s, sink.write, data)
        finally:
            sink.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = endpoint.rpartition(":")
        answers, requests = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pass_on(reader, requests), pass_on(answers, writer), return_exceptions=True)

    async def close() -> None:
        proxy.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which transports close

    loop, port = asyncio.new_event_loop(), free_port()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    proxy = asyncio.run_coroutine_threadsafe(asyncio.start_server(connect, "127.0.0.1", port), loop).result()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_patience_ends() -> None:
    began = time.monotonic()
    with pytest.raises(MissedAnswerError, match="cannot be reached"):
        RemoteTeam([f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"], wait_s=0.5)
    assert 0.3 < time.monotonic() - began < 5.0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="wait_s: expected a number of seconds from 0 on"):
            RemotePolicy("127.0.0.1:1", wait_s=wrong)
