"""Fuzzing of the administration of a server; part of ``python -m tests.support.fuzz``.

The server has a folder of versions: good ones, one of another team, and damaged ones. Valid, mutated and random
requests of every method come at once, while steps go on. Whatever an operator sends, the current version is held
and answers, each version answers as it always did, and only the statuses of :data:`ALLOWED` are told.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf.message import Message

from omcda_deploy.bundle import MANIFEST
from omcda_deploy.protos import admin_pb2, policy_pb2
from omcda_deploy.serve.admin import SERVICE
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle
from tests.support.fuzz_calls import KINDS, NAMES, Kind, mutate, spoiled
from tests.support.server_process import free_port, server_process

ALLOWED = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")
GOOD, BAD = ("1", "2", "10"), ("3", "4", "5")
WORKERS = 4
STEPS_EVERY = 10  # calls from one round of steps to the next
DEADLINE_S = 20.0
REQUESTS: dict[str, type[Any]] = {
    **dict.fromkeys(("Load", "Switch", "Unload", "Shadow"), admin_pb2.VersionRequest),
    "EndStreams": admin_pb2.EndStreamsRequest,
    "Record": admin_pb2.RecordRequest,
    **dict.fromkeys(("ReloadConfig", "CheckConfig"), admin_pb2.ConfigRequest),
    "GetStatus": admin_pb2.GetStatusRequest,
    "ListStreams": admin_pb2.ListStreamsRequest,
}
START = """if True:
    import sys
    from omcda_deploy.serve import releases, server
    releases.LOAD_PAUSE_S = releases.CLOSE_PAUSE_S = 0.0
    sys.exit(server.main(sys.argv[1:]))
"""
OBSERVATION = bytes(16)


@dataclass
class AdminReport:
    """Results: statuses by kind of call, steps that were answered by version, and failures in words."""

    statuses: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def request_of(seed: int, index: int) -> tuple[Kind, str, bytes]:
    """Return kind, method and bytes of call ``index``, which depends on nothing else."""
    draw = Random(f"admin/{seed}/{index}")
    method = draw.choice(list(REQUESTS))
    (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
    message = _valid(draw, method)
    if kind == "message":
        mutate(message, draw)
    data = message.SerializeToString()
    return (
        kind,
        method,
        spoiled(data, _valid(draw, method).SerializeToString(), draw) if kind == "bytes" else data,
    )


def _valid(draw: Random, method: str) -> Message:
    request: Message = REQUESTS[method]()
    if isinstance(request, admin_pb2.VersionRequest):
        request.version = draw.choice((*GOOD, *GOOD, *BAD, "", "7"))
        if draw.random() < 0.3:
            request.expected_current = draw.choice((*GOOD, *NAMES))
        if draw.random() < 0.3:
            request.previous = draw.choice((*GOOD, *BAD, "", "1\n2"))
        if draw.random() < 0.3:
            request.evidence = draw.choice(('{"low": 1.5}', '{"a":\n[]}', "{}", "[]", "{", "[" * 5000))
    elif isinstance(request, admin_pb2.EndStreamsRequest):
        request.client = draw.choice(("all", "127.0.0.1", "[::1]:80", ""))
    return request


def write_versions(folder: Path) -> None:
    """Write the good versions, one of another team, one with half a manifest, and one with a changed graph."""
    for version in (*GOOD, "4", "5"):
        write_test_bundle(folder / version, continuous_spec(agents=1), seed=int(version))
    write_test_bundle(folder / "3", discrete_spec())
    manifest = folder / "4" / MANIFEST
    manifest.write_text(manifest.read_text()[:100])
    (folder / "5" / "agent_0" / "1" / "model.onnx").write_bytes(b"no graph")
    (folder / "current").write_text("1\n2\n")


def fuzz_admin(seed: int, calls: int) -> AdminReport:
    """Send ``calls`` calls to the admin port of a new server."""
    port = free_port()
    report = AdminReport()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_versions(folder)
        log = folder / "log"
        config = folder / "serve.toml"
        config.write_text("[limits]\nrows = 8\n")
        options = ("--admin-port", str(port), "--log-json", "--config", str(config))
        with server_process(folder, "agent_0", start=("-c", START), options=options, log=log) as server:
            asyncio.run(_drive(server.endpoint, f"127.0.0.1:{port}", seed, calls, report, folder))
            if server.process.poll() is not None:
                report.failures.append("the server has ended")
        for line in map(json.loads, log.read_text().splitlines()):
            if line["level"] in ("ERROR", "CRITICAL"):
                report.failures.append(f"the server's log: {line['message'][:1000]}")
    return report


async def _drive(endpoint: str, admin: str, seed: int, calls: int, report: AdminReport, folder: Path) -> None:
    numbers = iter(range(calls))
    answers: dict[str, bytes] = {}
    async with grpc.aio.insecure_channel(endpoint) as steps, grpc.aio.insecure_channel(admin) as operators:

        async def work() -> None:
            for index in numbers:
                kind, method, data = request_of(seed, index)
                status, details = await _ask(operators, method, data)
                report.statuses[kind, status] += 1
                if status not in ALLOWED:
                    report.failures.append(
                        f"call {index} ({kind} {method}): {status}: {details}: {data[:200]!r}"
                    )
                if index % STEPS_EVERY == 0:
                    await step()

        async def step() -> None:
            call: Any = steps.unary_unary("/omcda.v1.PolicyService/Act")
            request = policy_pb2.ActRequest(model="agent_0", batch=1, observation=OBSERVATION)
            try:
                data = await call(request.SerializeToString(), timeout=DEADLINE_S)
            except grpc.RpcError as error:
                report.failures.append(f"a step failed: {error}")
                return
            version = policy_pb2.ActResponse.FromString(data).model_version
            report.steps[version] += 1
            if version not in GOOD or answers.setdefault(version, data) != data:
                report.failures.append(f"version {version} answers otherwise than before, or at all")

        await asyncio.gather(*(work() for _ in range(WORKERS)))
        await step()
        status, answer = await _ask(operators, "GetStatus", b"")
        said = admin_pb2.ServerStatus.FromString(answer) if isinstance(answer, bytes) else None
        held = set() if said is None else {version.version for version in said.versions}
        if said is None or said.current not in held or not held <= set(GOOD):
            report.failures.append(f"at the end {status}, current and held: {said}")
            return
        noted = [said.current, said.previous, *filter(None, [said.evidence])]
        if (folder / "current").read_text() != "".join(f"{line}\n" for line in noted):
            report.failures.append("the file of the current version says otherwise than the server")


async def _ask(channel: grpc.aio.Channel, method: str, data: bytes) -> tuple[str, Any]:
    call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
    try:
        return "OK", await call(data, timeout=DEADLINE_S)
    except grpc.RpcError as error:
        refusal: Any = error
        return refusal.code().name, refusal.details()
