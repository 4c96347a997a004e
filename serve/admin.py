"""``omcda.v1.AdminService``: versions and control streams of a server, for its operators.

The service has its own port, so that a network can restrict it to operators. Every call that may change something
leaves one line in the audit log, refused calls too.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from omcda_deploy.protos import admin_pb2
from omcda_deploy.protos.admin_pb2 import (
    ControlStream,
    ControlStreams,
    EndStreamsRequest,
    GetStatusRequest,
    ListStreamsRequest,
    VersionRequest,
)
from omcda_deploy.serve.handlers import Handler, abort, parse
from omcda_deploy.serve.logs import audit
from omcda_deploy.serve.meter import Totals
from omcda_deploy.serve.places import Context, Place, Places
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.session import Session
from omcda_deploy.serve.status import EndedError, RequestError, status_of

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
RETIRE_EVERY_S = 1.0
ALL = "all"  # every client

R = TypeVar("R", bound=Message)


class AdminService:
    """Changes and describes the versions that a server holds, and its control streams."""

    def __init__(self, releases: Releases, streams: Places, serving: Callable[[], bool]) -> None:
        """``serving``: tells whether the server answers steps, or is about to stop."""
        self._releases, self._streams, self._serving = releases, streams, serving
        self._started = time.monotonic()

    def handlers(self) -> grpc.GenericRpcHandler:
        releases = self._releases
        changes: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Message | None]]]] = {
            "Load": (VersionRequest, lambda request: releases.load(request.version)),
            "Switch": (VersionRequest, self._switch),
            "Unload": (VersionRequest, lambda request: releases.unload(request.version)),
            "Shadow": (VersionRequest, lambda request: releases.set_shadow(request.version)),
            "EndStreams": (EndStreamsRequest, self._end_streams),
        }
        looks: dict[str, tuple[type[Any], Callable[[], Message]]] = {
            "GetStatus": (GetStatusRequest, self.status),
            "ListStreams": (ListStreamsRequest, lambda: _described(self._streams)),
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {name: self._change(name, *change) for name, change in changes.items()}
            | {name: _look(*look) for name, look in looks.items()},
        )

    async def retire(self) -> None:
        """Unload idle versions, until cancelled."""
        while True:
            await asyncio.sleep(RETIRE_EVERY_S)
            for version in await self._releases.retire():
                audit.info(
                    "version %s retired", version, extra={"fields": {"call": "retire", "version": version}}
                )

    def _change(
        self, name: str, request_type: type[R], change: Callable[[R], Awaitable[Message | None]]
    ) -> Handler:
        """Return the handler of a method that may change something; its answer is ``change``'s, or the status."""

        async def handle(data: bytes, context: Context) -> bytes:
            fields: dict[str, Any] = {"call": name, "peer": context.peer(), "version": "", "outcome": "OK"}
            try:
                # When the caller gives up, gRPC cancels this coroutine; the shield lets the change finish.
                answer = await asyncio.shield(asyncio.ensure_future(work(data, fields)))
                return (answer or self.status()).SerializeToString()
            except Exception as error:
                await abort(context, error)

        async def work(data: bytes, fields: dict[str, Any]) -> Message | None:
            started = time.perf_counter()
            try:
                request = parse(request_type, data)
                fields |= {field.name: value[:100] for field, value in request.ListFields()}
                return await change(request)
            except Exception as error:
                code, details = status_of(error)
                fields |= {"outcome": code.name, "reason": details}
                raise
            finally:
                fields |= {
                    "current": self._releases.current,
                    "seconds": round(time.perf_counter() - started, 6),
                }
                audit.info(
                    "%s by %s: %s, version %s answers",
                    " ".join(filter(None, (name, fields["version"], fields.get("client")))),
                    *(fields[entry] for entry in ("peer", "outcome", "current")),
                    extra={"fields": fields},
                )

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _switch(self, request: VersionRequest) -> None:
        previous = request.previous if request.HasField("previous") else None
        await self._releases.switch(request.version, request.expected_current, previous)

    async def _end_streams(self, request: EndStreamsRequest) -> ControlStreams:
        """End the control streams of a client."""
        if not request.client:
            raise RequestError(f"expected the address or the host of a client, or {ALL}, got none")
        ended = [place for place in self._streams if request.client in (ALL, *_addresses(place))]
        for place in ended:
            self._streams.end(place, EndedError("an operator ended this stream: open a new one, or ask them"))
            self._streams.refused["operator"] += 1
        return _described(ended)

    def status(self) -> admin_pb2.ServerStatus:
        """Describe the server, the versions it holds and the current version's models."""
        releases = self._releases
        return admin_pb2.ServerStatus(
            current=releases.current,
            previous=releases.previous,
            shadow=releases.shadow,
            versions=[
                admin_pb2.HeldVersion(version=models.version, bundle_digest=models.digest, idle_s=idle_s)
                for models, idle_s in releases.held_versions()
            ],
            models=[
                _model_status(session, releases.models().bundle.budgets)
                for session in releases.models().sessions.values()
            ],
            uptime_s=time.monotonic() - self._started,
            contract_hash=releases.contract_hash,
            serving=self._serving(),
        )


def _look(request_type: type[R], look: Callable[[], Message]) -> Handler:
    """Return the handler of a method that changes nothing and leaves no line."""

    async def handle(data: bytes, context: Context) -> bytes:
        try:
            parse(request_type, data)
            return look().SerializeToString()
        except Exception as error:
            await abort(context, error)

    return grpc.unary_unary_rpc_method_handler(handle)


def _addresses(place: Place) -> tuple[str, str]:
    """Return a client's address without gRPC's scheme and escapes, and its host."""
    address = unquote(place.peer).removeprefix("ipv4:").removeprefix("ipv6:")
    return address, address.rpartition(":")[0].strip("[]")


def _described(streams: Iterable[Place]) -> ControlStreams:
    now = time.monotonic()
    return ControlStreams(
        streams=[
            ControlStream(
                client=_addresses(place)[0],
                age_s=now - place.began,
                idle_s=now - place.since,
                steps=place.steps,
            )
            for place in streams
        ]
    )


def _model_status(session: Session, budgets: dict[str, float | None]) -> admin_pb2.ModelStatus:
    meter, guard = session.meter, session.guard
    totals, recent = meter.totals(), meter.recent()
    agents = []
    for index, agent in enumerate(agent.name for agent in guard.agents):
        budget = budgets[agent]
        agents.append(
            admin_pb2.AgentStatus(
                agent=agent,
                divergence=_mean(totals.divergence[index], totals),
                budget=math.nan if budget is None else budget,
                guard=guard.settings[index].mode,
                threshold=float(guard.thresholds[index]),
                exceeded=_mean(totals.exceeded[index], totals),
                replaced=_mean(totals.replaced[index], totals),
            )
        )
    return admin_pb2.ModelStatus(
        model=session.name,
        answers=totals.answers,
        answers_per_s=0.0 if recent is None else recent.per_second,
        p50_ms=math.nan if recent is None else recent.p50_ms,
        p99_ms=math.nan if recent is None else recent.p99_ms,
        agents=agents,
        shadow_difference=meter.difference / meter.compared if meter.compared else math.nan,
    )


def _mean(total: float, totals: Totals) -> float:
    """Return a sum over rows as a mean; NaN without rows."""
    return float(total) / totals.rows if totals.rows else math.nan
