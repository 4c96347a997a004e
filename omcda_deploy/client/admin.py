"""Administration of a team's servers: load, switch and roll back versions on all of them together.

A switch has two phases. First every server loads and warms up the version, which changes nothing for clients; if
one server cannot, the switch fails and the others unload the version again. Only then every server makes it
current. Clients name the version of their episode in every request, so none of them notices the moment in which
some servers have switched and others have not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc

from omcda_deploy.client.channel import Credentials, open_channel
from omcda_deploy.errors import EndpointError
from omcda_deploy.protos.admin_pb2 import GetStatusRequest, ServerStatus, VersionRequest

SERVICE = "/omcda.v1.AdminService/"
LIMIT_S = 60.0  # for one call, as a large bundle on a slow disk needs it

Statuses = dict[str, ServerStatus]  # by endpoint


class TeamAdmin:
    """Calls the admin ports of a team's servers, all at once.

    Every method returns the servers' statuses after the call, by endpoint, and raises :class:`EndpointError`, which
    names the servers that failed.
    """

    def __init__(self, endpoints: Sequence[str], credentials: Credentials | None = None) -> None:
        if not endpoints:
            raise EndpointError(
                "expected at least one admin endpoint, got none: start servers with --admin-port"
            )
        self._channels = {endpoint: open_channel(endpoint, credentials) for endpoint in endpoints}
        self._metadata = () if credentials is None else credentials.metadata
        self._pool = ThreadPoolExecutor(len(self._channels))

    def status(self) -> Statuses:
        """Return the statuses of all servers."""
        return self._all("GetStatus", self._channels)

    def survey(self) -> tuple[Statuses, Mapping[str, str]]:
        """Return the statuses of the servers that answer, and the errors of the others, by endpoint."""
        return self._ask("GetStatus", self._channels, "")

    def load(self, version: str) -> Statuses:
        """Load a version on all servers, or on none."""
        without = [
            endpoint for endpoint, status in self.status().items() if version not in _held_versions(status)
        ]
        try:
            return self._all("Load", self._channels, version)
        except EndpointError:
            self._undo("Unload", without, version)
            raise

    def switch(self, version: str) -> Statuses:
        """Load a version on all servers and make it current on all, or on none."""
        statuses = self.load(version)
        try:
            return self._all("Switch", self._channels, version)
        except EndpointError:
            for endpoint, status in statuses.items():
                self._undo("Switch", [endpoint], status.current)
            raise

    def rollback(self) -> Statuses:
        """Switch to the version that answered before."""
        previous = {endpoint: status.previous for endpoint, status in self.status().items()}
        versions = set(previous.values())
        if len(versions) != 1 or "" in versions:
            listing = ", ".join(f"{endpoint} {version or 'none'}" for endpoint, version in previous.items())
            raise EndpointError(
                f"expected one previous version on all servers, got {listing}: name the version with  "
                "release switch"
            )
        return self.switch(versions.pop())

    def unload(self, version: str) -> Statuses:
        """Unload a version on all servers."""
        return self._all("Unload", self._channels, version)

    def shadow(self, version: str) -> Statuses:
        """Load a version on all servers and run it beside the current one; an empty version ends that."""
        if version:
            self.load(version)
        return self._all("Shadow", self._channels, version)

    def close(self) -> None:
        self._pool.shutdown()
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, method: str, endpoints: Iterable[str], version: str = "") -> Statuses:
        answers, failures = self._ask(method, endpoints, version)
        if failures:
            listing = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in failures.items())
            raise EndpointError(
                f"{method} {version}".strip() + f" failed on {len(failures)} servers: {listing}"
            )
        return answers

    def _undo(self, method: str, endpoints: Iterable[str], version: str) -> None:
        """Undo a change where it can be undone: a server that cannot be reached has no change left to undo."""
        self._ask(method, endpoints, version)

    def _ask(self, method: str, endpoints: Iterable[str], version: str) -> tuple[Statuses, Mapping[str, str]]:
        request = GetStatusRequest() if method == "GetStatus" else VersionRequest(version=version)
        calls = {endpoint: self._pool.submit(self._call(endpoint, method), request) for endpoint in endpoints}
        answers: Statuses = {}
        failures: dict[str, str] = {}
        for endpoint, call in calls.items():
            try:
                answers[endpoint] = call.result()
            except grpc.RpcError as error:
                failures[endpoint] = _reason(error)
        return answers, failures

    def _call(self, endpoint: str, method: str) -> Callable[[Any], ServerStatus]:
        ask: Any = self._channels[endpoint].unary_unary(
            SERVICE + method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ServerStatus.FromString,
        )
        return lambda request: ask(request, timeout=LIMIT_S, metadata=self._metadata)


def _held_versions(status: ServerStatus) -> list[str]:
    return [held.version for held in status.versions]


def _reason(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)
