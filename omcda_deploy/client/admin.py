"""Administration of a team's servers: versions and control streams of all of them together.

A switch has two phases. First every server loads and warms up the version, which changes nothing for clients; if
one server cannot, the switch fails and the others unload the version again. Only then every server makes it
current. Clients name the version of their episode in every request, so none of them notices the moment in which
some servers have switched and others have not.

In the second phase each server is told which version it is to replace, and refuses if that is not current any more.
So of two operators who switch at once at most one succeeds. Each undoes its own half alone, which it knows by a
name of the switch, as both may want the same version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import grpc
from google.protobuf.message import Message

from omcda_deploy.client.channel import Credentials, open_channel
from omcda_deploy.errors import EndpointError
from omcda_deploy.protos.admin_pb2 import (
    ConfigRequest,
    ControlStream,
    ControlStreams,
    EndStreamsRequest,
    GetStatusRequest,
    ListStreamsRequest,
    RecordRequest,
    ServerStatus,
    VersionRequest,
)

SERVICE = "/omcda.v1.AdminService/"
LIMIT_S = 60.0  # for one call, as a large bundle on a slow disk needs it
UNDO_LIMIT_S = 5.0  # a server that does not answer has done nothing that could be undone

Statuses = dict[str, ServerStatus]  # by endpoint
Streams = dict[str, list[ControlStream]]  # by endpoint
_ANSWERS: Mapping[str, Any] = {"ListStreams": ControlStreams, "EndStreams": ControlStreams}


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
        return self._all("GetStatus", GetStatusRequest())

    def survey(self) -> tuple[Statuses, Mapping[str, str]]:
        """Return the statuses of the servers that answer, and the errors of the others, by endpoint."""
        return self._ask("GetStatus", dict.fromkeys(self._channels, GetStatusRequest()))

    def load(self, version: str, *, as_held: bool = False) -> Statuses:
        """Load a version, of one bundle, on all servers, or on none.

        ``as_held``: whether servers that hold it may hold another bundle than their folder has under this name.
        """
        without = [
            endpoint for endpoint, status in self.status().items() if version not in _held_versions(status)
        ]
        try:
            statuses = self._all("Load", VersionRequest(version=version, as_held=as_held))
            _require_one_bundle(version, statuses)
            return statuses
        except EndpointError:
            self._ask("Unload", dict.fromkeys(without, VersionRequest(version=version)))
            raise

    def switch(self, version: str, replacing: str | None = None, evidence: str = "") -> Statuses:
        """Load a version on all servers and make it current on all, or on none.

        ``replacing``: the version that must be current on all of them; what is current on each now if None.
        ``evidence``: why, as a JSON object, which servers write into their audit lines and tell in their statuses.
        """
        return self._switch(version, self.status(), replacing, evidence)

    def rollback(self) -> Statuses:
        """Switch to the version that answered before, as the servers hold it.

        Where the folder has another bundle under that name by now, ``folder_digest`` of the statuses tells.
        """
        statuses = self.status()
        versions = {status.previous for status in statuses.values()}
        if len(versions) != 1 or "" in versions:
            listing = ", ".join(
                f"{endpoint} {status.previous or 'none'}" for endpoint, status in statuses.items()
            )
            raise EndpointError(
                f"expected one previous version on all servers, got {listing}: name the version with  "
                "release switch"
            )
        return self._switch(versions.pop(), statuses, as_held=True)

    def unload(self, version: str) -> Statuses:
        """Unload a version on all servers."""
        return self._all("Unload", VersionRequest(version=version))

    def shadow(self, version: str) -> Statuses:
        """Load a version on all servers and run it beside the current one; an empty version ends that."""
        if version:
            self.load(version)
        return self._all("Shadow", VersionRequest(version=version))

    def record(self, folder: str) -> Statuses:
        """Let all servers record into ``folder``, an absolute path of theirs, or none; an empty one ends it."""
        before = self.status()
        answers, failures = self._ask("Record", dict.fromkeys(self._channels, RecordRequest(folder=folder)))
        if failures:
            undo = {name: RecordRequest(folder=before[name].recording) for name in answers}
            self._ask("Record", undo, UNDO_LIMIT_S)
            raise _failure("Record", folder, failures)
        return answers

    def reload_config(self) -> Statuses:
        """Let all servers do as their configuration files say by now, or none if one of the files is wrong."""
        self._all("CheckConfig", ConfigRequest())
        return self._all("ReloadConfig", ConfigRequest())

    def streams(self) -> Streams:
        """Return the open control streams of all servers, by endpoint."""
        return _streams(self._all("ListStreams", ListStreamsRequest()))

    def end_streams(self, client: str) -> Streams:
        """End the control streams of a client on all servers, and return them.

        ``client``: its address as :meth:`streams` tells it, its host for all its streams, or ``"all"``.
        """
        return _streams(self._all("EndStreams", EndStreamsRequest(client=client)))

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

    def _switch(
        self,
        version: str,
        before: Statuses,
        replacing: str | None = None,
        evidence: str = "",
        *,
        as_held: bool = False,
    ) -> Statuses:
        """Switch from the versions that are current in ``before``, or leave those and the previous ones."""
        self.load(version, as_held=as_held)
        change = uuid4().hex
        answers, failures = self._ask(
            "Switch",
            {
                endpoint: VersionRequest(
                    version=version,
                    expected_current=replacing or status.current,
                    evidence=evidence,
                    change=change,
                    as_held=as_held,
                )
                for endpoint, status in before.items()
            },
        )
        if failures:
            undo = {
                endpoint: VersionRequest(
                    version=status.current,
                    expected_current=version,
                    previous=status.previous,
                    evidence=status.evidence,
                    undoes=change,
                )
                for endpoint, status in before.items()
                if status.current != version
            }
            self._ask("Switch", undo, UNDO_LIMIT_S)  # refused by the servers that have not made this switch
            raise _failure("Switch", version, failures)
        return answers

    def _all(self, method: str, request: Any) -> dict[str, Any]:
        answers, failures = self._ask(method, dict.fromkeys(self._channels, request))
        if failures:
            raise _failure(method, getattr(request, "version", ""), failures)
        return answers

    def _ask(
        self, method: str, requests: Mapping[str, Message], limit_s: float | None = None
    ) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Send the requests at once; returns the answers, and the reasons of those who gave none, by endpoint."""
        limit = LIMIT_S if limit_s is None else limit_s
        calls = {
            endpoint: self._pool.submit(self._call(endpoint, method), request, limit)
            for endpoint, request in requests.items()
        }
        answers: dict[str, Any] = {}
        failures: dict[str, str] = {}
        for endpoint, call in calls.items():
            try:
                answers[endpoint] = call.result()
            except grpc.RpcError as error:
                failures[endpoint] = _reason(error)
        return answers, failures

    def _call(self, endpoint: str, method: str) -> Callable[[Message, float], Any]:
        ask: Any = self._channels[endpoint].unary_unary(
            SERVICE + method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=_ANSWERS.get(method, ServerStatus).FromString,
        )
        return lambda request, limit_s: ask(request, timeout=limit_s, metadata=self._metadata)


def _failure(method: str, version: str, failures: Mapping[str, str]) -> EndpointError:
    listing = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in failures.items())
    return EndpointError(f"{method} {version}".strip() + f" failed on {len(failures)} servers: {listing}")


def _require_one_bundle(version: str, statuses: Statuses) -> None:
    """Raise :class:`EndpointError` unless all servers hold one bundle as ``version``."""
    digests = {
        endpoint: held.bundle_digest
        for endpoint, status in statuses.items()
        for held in status.versions
        if held.version == version
    }
    if len(set(digests.values())) > 1:
        listing = ", ".join(f"{endpoint} {digest[:12]}" for endpoint, digest in digests.items())
        raise EndpointError(
            f"expected one bundle as version {version} on all servers, got {listing}: give them one folder, unload "
            "the version, and try again"
        )


def _streams(answers: Mapping[str, ControlStreams]) -> Streams:
    return {endpoint: list(answer.streams) for endpoint, answer in answers.items()}


def _held_versions(status: ServerStatus) -> list[str]:
    return [held.version for held in status.versions]


def _reason(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)
