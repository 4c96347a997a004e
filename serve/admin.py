"""``omcda.v1.AdminService``: load, switch and unload versions, for operators of a server.

The service has its own port, so that a network can restrict it to operators. Every call that may change something
leaves one line in the audit log, refused calls too.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from omcda_deploy.protos import admin_pb2
from omcda_deploy.serve.handlers import Context, abort, parse
from omcda_deploy.serve.logs import audit
from omcda_deploy.serve.meter import Totals
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.session import Session
from omcda_deploy.serve.status import status_of

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
RETIRE_EVERY_S = 1.0


class AdminService:
    """Changes and describes the versions that a server holds."""

    def __init__(self, releases: Releases, serving: Callable[[], bool]) -> None:
        """``serving``: tells whether the server answers steps, or is about to stop."""
        self._releases, self._serving = releases, serving
        self._started = time.monotonic()

    def handlers(self) -> grpc.GenericRpcHandler:
        changes: dict[str, Callable[[str], Awaitable[None]]] = {
            "Load": self._releases.load,
            "Switch": self._releases.switch,
            "Unload": self._releases.unload,
            "Shadow": self._releases.set_shadow,
        }
        handlers = {name: self._change(name, change) for name, change in changes.items()}
        return grpc.method_handlers_generic_handler(
            SERVICE, {**handlers, "GetStatus": grpc.unary_unary_rpc_method_handler(self._get_status)}
        )

    async def retire(self) -> None:
        """Unload idle versions, until cancelled."""
        while True:
            await asyncio.sleep(RETIRE_EVERY_S)
            for version in await self._releases.retire():
                audit.info(
                    "version %s retired", version, extra={"fields": {"call": "retire", "version": version}}
                )

    def _change(self, name: str, change: Callable[[str], Awaitable[None]]) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(data: bytes, context: Context) -> bytes:
            fields: dict[str, Any] = {"call": name, "peer": context.peer(), "version": "", "outcome": "OK"}
            started = time.perf_counter()
            try:
                version = parse(admin_pb2.VersionRequest, data).version
                fields["version"] = version[:100]
                # When the caller gives up, gRPC cancels this coroutine; the shield lets the change finish.
                await asyncio.shield(asyncio.ensure_future(change(version)))
                answer = self.status().SerializeToString()
            except Exception as error:
                code, details = status_of(error)
                fields |= {"outcome": code.name, "reason": details}
                self._audit(fields, started)
                await context.abort(code, details)
                raise  # not reached: abort raises
            self._audit(fields, started)
            return answer

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _get_status(self, data: bytes, context: Context) -> bytes:
        try:
            parse(admin_pb2.GetStatusRequest, data)
            return self.status().SerializeToString()
        except Exception as error:
            await abort(context, error)
            raise  # not reached: abort raises

    def _audit(self, fields: dict[str, Any], started: float) -> None:
        fields |= {"current": self._releases.current, "seconds": round(time.perf_counter() - started, 6)}
        audit.info(
            "%(call)s %(version)s by %(peer)s: %(outcome)s, version %(current)s answers",
            fields,
            extra={"fields": fields},
        )

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
