"""``omcda.v1.AdminService``: versions and control streams of a server, for its operators.

The service has its own port, so that a network can restrict it to operators. Every call that may change something
leaves one line in the audit log, refused calls too. It names the operator, where there are tokens or certificates.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from omcda_deploy.protos import admin_pb2
from omcda_deploy.protos.admin_pb2 import (
    ConfigRequest,
    ControlStream,
    ControlStreams,
    EndStreamsRequest,
    GetStatusRequest,
    ListStreamsRequest,
    RecordRequest,
    VersionRequest,
)
from omcda_deploy.serve.handlers import Handler, abort, parse
from omcda_deploy.serve.logs import audit
from omcda_deploy.serve.meter import Totals
from omcda_deploy.serve.places import Context, Place, Places
from omcda_deploy.serve.recording import FlightRecorder
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.reloading import Reloader
from omcda_deploy.serve.security import DENIED
from omcda_deploy.serve.session import NAME_LIMIT, Session
from omcda_deploy.serve.status import EndedError, RequestError, status_of

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
RETIRE_EVERY_S = 1.0
ALL = "all"  # every client
EVIDENCE_LIMIT = 4096  # characters
REASONS = {"evidence": "promoted on", "replaced_evidence": "in place of one promoted on"}

R = TypeVar("R", bound=Message)


class AdminService:
    """Changes and describes the versions that a server holds, and its control streams."""

    def __init__(
        self,
        releases: Releases,
        recorder: FlightRecorder,
        streams: Places,
        reloader: Reloader,
        operator: Callable[[Context], Mapping[str, str]],
        serving: Callable[[], bool],
    ) -> None:
        """``operator``: describes the caller. ``serving``: tells whether the server answers steps."""
        self._releases, self._recorder, self._reloader = releases, recorder, reloader
        self._streams, self._operator, self._serving = streams, operator, serving
        self._started = time.monotonic()

    def handlers(self) -> grpc.GenericRpcHandler:
        releases = self._releases
        changes: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Message | None]]]] = {
            "Load": (VersionRequest, self._load),
            "Switch": (VersionRequest, self._switch),
            "Unload": (VersionRequest, lambda request: releases.unload(request.version)),
            "Shadow": (VersionRequest, lambda request: releases.set_shadow(request.version)),
            "Record": (RecordRequest, lambda request: self._recorder.switch(request.folder)),
            "EndStreams": (EndStreamsRequest, self._end_streams),
            "ReloadConfig": (ConfigRequest, lambda _: self._reloader.reload()),
            "CheckConfig": (ConfigRequest, lambda _: self._reloader.reload(apply=False)),
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
            fields: dict[str, Any] = {**self._fields(name, context), "outcome": "OK"}
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
                for field, value in request.ListFields():
                    fields[field.name] = value if isinstance(value, bool) else value[:100]
                answer = await change(request)
                fields |= self._reasons() if name == "Switch" else {}
                return answer
            except Exception as error:
                code, details = status_of(error)
                fields |= {"outcome": code.name, "reason": details}
                raise
            finally:
                self._note(fields | {"seconds": round(time.perf_counter() - started, 6)})

        return grpc.unary_unary_rpc_method_handler(handle)

    def deny(self, method: str, context: Context) -> None:
        """Note a call without a valid token."""
        fields = self._fields(method.rpartition("/")[2][:100], context)
        self._note(fields | {"outcome": grpc.StatusCode.UNAUTHENTICATED.name, "reason": DENIED})

    def _fields(self, call: str, context: Context) -> dict[str, Any]:
        return {"call": call, "peer": context.peer(), **self._operator(context), "version": ""}

    def _note(self, fields: dict[str, Any]) -> None:
        """Leave a line in the audit log."""
        fields["current"] = self._releases.current
        names = [fields[entry] for entry in ("operator", "certificate") if entry in fields]
        audit.info(
            "%s by %s: %s, version %s answers%s",
            " ".join(filter(None, map(fields.get, ("call", "version", "client", "folder")))),
            " ".join([", ".join(names), f"({fields['peer']})"] if names else [fields["peer"]]),
            fields["outcome"],
            fields["current"],
            "".join(
                f", {words} {json.dumps(fields[entry])}"
                for entry, words in REASONS.items()
                if isinstance(fields.get(entry), dict)
            ),
            extra={"fields": fields},
        )

    async def _load(self, request: VersionRequest) -> None:
        await self._releases.load(request.version, as_held=request.as_held)

    async def _switch(self, request: VersionRequest) -> None:
        previous = request.previous if request.HasField("previous") else None
        await self._releases.switch(
            request.version,
            request.expected_current,
            previous,
            _one_line(request.evidence),
            change=request.change,
            undoes=request.undoes,
            as_held=request.as_held,
        )

    def _reasons(self) -> dict[str, Any]:
        """Return on what evidence the current version was promoted, and the one that it replaced."""
        texts = zip(REASONS, (self._releases.evidence, self._releases.replaced_evidence), strict=True)
        return {entry: json.loads(text) for entry, text in texts if text}

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
                admin_pb2.HeldVersion(
                    version=models.version,
                    bundle_digest=models.digest,
                    idle_s=idle_s,
                    folder_digest=models.folder_digest,
                )
                for models, idle_s in releases.held_versions()
            ],
            models=[
                _model_status(session, releases.models().bundle.budgets)
                for session in releases.models().sessions.values()
            ],
            uptime_s=time.monotonic() - self._started,
            contract_hash=releases.contract_hash,
            serving=self._serving(),
            recording=self._recorder.folder,
            recorded_rows=self._recorder.tally.recorded,
            lost_rows=self._recorder.tally.lost.total(),
            evidence=releases.evidence,
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


def _one_line(evidence: str) -> str:
    """Return a JSON object in one line, or the empty string. Raises :class:`RequestError` for anything else."""
    if not evidence:
        return ""
    if len(evidence) > EVIDENCE_LIMIT:
        raise RequestError(f"evidence: expected at most {EVIDENCE_LIMIT} characters, got {len(evidence)}")
    try:
        values = json.loads(evidence)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RequestError(f"evidence: expected a JSON object, got {evidence[:NAME_LIMIT]!r}")
    return json.dumps(values)


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
        shadow_answers=meter.compared,
        shadow_failures=meter.shadow_failures,
    )


def _mean(total: float, totals: Totals) -> float:
    """Return a sum over rows as a mean; NaN without rows."""
    return float(total) / totals.rows if totals.rows else math.nan
