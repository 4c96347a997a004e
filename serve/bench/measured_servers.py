"""Servers under measurement: real processes on this machine, their use of CPU and memory, and their requests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import grpc
import numpy as np

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.errors import EndpointError
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.protos.tensors import DTYPES, input_tensors
from omcda_deploy.serve.options import LOOPBACK
from omcda_deploy.spec import TeamSpec

INFER = "/inference.GRPCInferenceService/ModelInfer"
ACT, STREAM = "/omcda.v1.PolicyService/Act", "/omcda.v1.PolicyService/ActStream"
MESSAGES = 256  # different requests per model
STOP_LIMIT_S = 10.0
ANSWER_LIMIT_S = 10.0

Requests = Mapping[tuple[str, str], Sequence[bytes]]  # serialised, by path and model


@dataclass(frozen=True)
class Servers:
    """Processes that are measured as one."""

    endpoints: Mapping[str, str]  # by model
    processes: Sequence[subprocess.Popen[str]]
    ready_s: float  # from the start to the ready line
    admin: Sequence[str] = ()  # addresses of the admin ports

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far by all threads."""
        # The id of another process' clock, made as clock_getcpuclockid(3) does.
        return sum(time.clock_gettime(~process.pid << 3 | 2) for process in self.processes)

    def rss_mb(self) -> float:
        """Return the resident memory in 10^6 bytes."""
        pages = (int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) for p in self.processes)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def start_models(
    stack: ExitStack,
    source: Path,
    groups: Sequence[Sequence[str]],
    config: Path | None,
    *,
    admin: bool = False,
    record: Path | None = None,
) -> Servers:
    """Start one server for each group of models, until ``stack`` closes.

    ``source``: a bundle, or a folder of versions. ``admin``: give each an admin port. ``record``: a folder to
    record into. Raises :class:`EndpointError`.
    """
    endpoints: dict[str, str] = {}
    processes = []
    ports = [_free_port() for _ in groups] if admin else []
    began = time.perf_counter()
    for index, models in enumerate(groups):
        arguments = [str(source), *(part for model in models for part in ("--model", model))]
        arguments += ["--admin-port", str(ports[index])] if admin else []
        arguments += [] if config is None else ["--config", str(config)]
        arguments += [] if record is None else ["--record", str(record)]
        endpoint, process = stack.enter_context(_started("omcda_deploy.serve", arguments))
        endpoints |= dict.fromkeys(models, endpoint)
        processes.append(process)
    ready_s = time.perf_counter() - began
    return Servers(endpoints, processes, ready_s, [f"{LOOPBACK}:{port}" for port in ports])


def start_plain(stack: ExitStack, bundle: Bundle, model: str) -> Servers:
    """Start a server of one model as a user would write it, until ``stack`` closes."""
    began = time.perf_counter()
    path = str(bundle.model_path(model))
    endpoint, process = stack.enter_context(_started("omcda_deploy.serve.bench.plain", [path]))
    return Servers({model: endpoint}, [process], time.perf_counter() - began)


def start_echo(
    stack: ExitStack, servers: Servers, model: str, requests: Requests, *, defaults: bool = False
) -> Servers:
    """Start a server that answers as many bytes as ``servers`` do for ``model``, until ``stack`` closes.

    ``defaults``: with gRPC's and asyncio's own poller and event loop rather than those of ``servers``.
    """
    sizes = {}
    with grpc.insecure_channel(servers.endpoints[model], (("grpc.enable_http_proxy", 0),)) as channel:
        untyped: Any = channel
        for path in (ACT, INFER):
            try:
                answer = untyped.unary_unary(path)(requests[path, model][0], timeout=ANSWER_LIMIT_S)
            except grpc.RpcError as error:
                raise EndpointError(
                    f"the server to measure refused an ordinary request ({error}): look at --config"
                ) from error
            sizes[path] = str(len(answer))
    arguments = [part for path, size in sizes.items() for part in ("--unary", path, size)]
    arguments += ["--defaults"] if defaults else []
    began = time.perf_counter()
    endpoint, process = stack.enter_context(
        _started("omcda_deploy.serve.bench.echo", [*arguments, "--stream", STREAM, sizes[ACT]])
    )
    return Servers({model: endpoint}, [process], time.perf_counter() - began)


def requests_of(spec: TeamSpec, seed: int) -> Requests:
    """Make :data:`MESSAGES` requests of one row per model and method.

    Observations are standard normal, and all actions are available.
    """
    draw = np.random.default_rng(seed)
    requests: dict[tuple[str, str], list[bytes]] = {}
    for model in (*spec.names, TEAM):
        tensors = [tensor for tensor in input_tensors(spec, model) if tensor.name != "noise"]
        for step in range(1, MESSAGES + 1):
            rows = {
                tensor: draw.standard_normal(tensor.shape(1)).astype(DTYPES[tensor.datatype])
                if tensor.datatype == "FP32"
                else np.ones(tensor.shape(1), DTYPES[tensor.datatype])
                for tensor in tensors
            }
            act = policy_pb2.ActRequest(model=model, contract_hash=spec.contract_hash, step_id=step, batch=1)
            infer = oip.ModelInferRequest(model_name=model)
            for tensor, values in rows.items():
                setattr(act, tensor.name, tensor.encode(values))
                infer.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=values.shape)
                infer.raw_input_contents.append(tensor.encode(values))
            for path, message in ((ACT, act), (STREAM, act), (INFER, infer)):
                requests.setdefault((path, model), []).append(message.SerializeToString())
    return requests


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _started(module: str, arguments: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield the address and the process of a ready server; stop it at the end, and print its log if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    with (
        TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()  # empty when the process ends first
            if not ready.startswith("serving "):
                raise EndpointError("a server to measure did not start: it said why above")
            yield ready.split()[-1], process
        except EndpointError:
            log.seek(0)
            shutil.copyfileobj(log, sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
