"""Operating the servers of a team: load, switch and roll back versions on all of them together.

A switch has two phases. First every server loads and warms up the version, and nothing changes for anybody; one
that cannot makes the whole switch fail, and the others give the version up again. Only then every server makes it
current. Clients name the version of their episode in every request, so the moment in which some servers have moved
and some have not is seen by none of them.
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
LIMIT_S = 60.0  # for one call: a large bundle on a slow disk

Statuses = dict[str, ServerStatus]  # by endpoint


class TeamAdmin:
    """The admin ports of a team's servers. Calls go to all at once.

    Raises :class:`EndpointError` naming the servers that could not do what was asked.
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
        return self._all("GetStatus", self._channels)

    def survey(self) -> tuple[Statuses, Mapping[str, str]]:
        """The servers that answer, and why the others do not, by endpoint."""
        return self._ask("GetStatus", self._channels, "")

    def load(self, version: str) -> Statuses:
        """Load a version on all servers, or on none."""
        before = self.status()
        fresh = [at for at, status in before.items() if version not in _versions(status)]
        try:
            return self._all("Load", self._channels, version)
        except EndpointError:
            self._try("Unload", fresh, version)
            raise

    def switch(self, version: str) -> Statuses:
        """Load a version on all servers and make it current on all, or on none."""
        before = self.load(version)
        try:
            return self._all("Switch", self._channels, version)
        except EndpointError:
            for at, status in before.items():
                self._try("Switch", [at], status.current)
            raise

    def rollback(self) -> Statuses:
        """Switch to the version that answered before."""
        previous = {at: status.previous for at, status in self.status().items()}
        named = set(previous.values())
        if len(named) != 1 or "" in named:
            shown = ", ".join(f"{at} {version or 'none'}" for at, version in previous.items())
            raise EndpointError(
                f"expected one previous version on all servers, got {shown}: name the version with  release switch"
            )
        return self.switch(named.pop())

    def unload(self, version: str) -> Statuses:
        return self._all("Unload", self._channels, version)

    def shadow(self, version: str) -> Statuses:
        """Run a version beside the current one on all servers, loading it first; an empty one ends it."""
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
            shown = "; ".join(f"{at}: {reason}" for at, reason in failures.items())
            raise EndpointError(
                f"{method} {version}".strip() + f" failed on {len(failures)} servers: {shown}"
            )
        return answers

    def _try(self, method: str, endpoints: Iterable[str], version: str) -> None:
        """To undo what was done: what cannot be reached now has not done it, or is gone with it."""
        self._ask(method, endpoints, version)

    def _ask(self, method: str, endpoints: Iterable[str], version: str) -> tuple[Statuses, Mapping[str, str]]:
        request = GetStatusRequest() if method == "GetStatus" else VersionRequest(version=version)
        calls = {at: self._pool.submit(self._call(at, method), request) for at in endpoints}
        answers: Statuses = {}
        failures: dict[str, str] = {}
        for at, call in calls.items():
            try:
                answers[at] = call.result()
            except grpc.RpcError as error:
                failures[at] = _reason(error)
        return answers, failures

    def _call(self, endpoint: str, method: str) -> Callable[[Any], ServerStatus]:
        ask: Any = self._channels[endpoint].unary_unary(
            SERVICE + method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ServerStatus.FromString,
        )
        return lambda request: ask(request, timeout=LIMIT_S, metadata=self._metadata)


def _versions(status: ServerStatus) -> list[str]:
    return [held.version for held in status.versions]


def _reason(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)
