"""Fuzzing of a policy server and its administration: ``python -m tests.support.fuzz``.

Every call of :mod:`tests.support.fuzz_calls` must end within its deadline with a status of the table
:data:`ALLOWED`. If the status is OK, the request is judged again from its bytes by :mod:`tests.support.judge`,
which shares no code with the server. A call that fails is printed with its bytes, and with its seed and number,
with which it can be sent again alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from omcda_deploy.bundle import Bundle
from omcda_deploy.spec import TeamSpec
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle
from tests.support.fuzz_admin import fuzz_admin
from tests.support.fuzz_calls import MESSAGE_LIMIT, STREAM, WEIGHTS, Call, Fuzzer, Kind
from tests.support.judge import complaint
from tests.support.server_process import ServerProcess, server_process

ALLOWED = {
    "OK": "the request deserves it",
    "INVALID_ARGUMENT": "bytes, fields, shapes or values that do not fit",
    "NOT_FOUND": "unknown model or version",
    "OUT_OF_RANGE": "valid, but the policy has no finite action there",
    "FAILED_PRECONDITION": "another contract",
    "RESOURCE_EXHAUSTED": "larger than a message may be",
}
DEADLINE_S = 20.0  # far more than any call takes: only one that hangs misses it
CONCURRENT = 24  # calls in flight, few of them streams, so that no limit of the server is reached
STREAMS = 6
GROWTH_LIMIT_KB = 24 << 10
CONTROL_EVERY = 100  # calls from one round of control requests to the next
PRINTED = 1000  # bytes of a failing message that are printed

ADMIN_SHARE = 20  # calls of steps for one of administration
NO_PROXY = (("grpc.enable_http_proxy", 0),)
TEAMS = {"continuous": continuous_spec, "discrete": discrete_spec}


Outcome: TypeAlias = tuple[str, str, list[bytes]]  # status, details, answers


@dataclass
class FuzzReport:
    """Results of the calls: statuses by kind of call, calls by method, and failures in words."""

    statuses: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    controls: int = 0  # rounds of control requests
    failures: list[str] = field(default_factory=list)
    grown_kb: int = 0  # memory of the server, from a quarter of the calls on


def fuzz(bundle: Bundle, seed: int, first: int, calls: int) -> FuzzReport:
    """Send ``calls`` calls from number ``first`` on to a new server of all models of ``bundle``."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server_process(bundle, log=log) as server:
            report = _fuzz(server, bundle, seed, first, calls)
        if "ERROR" in (text := log.read_text()) or "Traceback" in text:
            report.failures.append(f"the server's log: {text[:PRINTED]}")
    return report


def _fuzz(server: ServerProcess, bundle: Bundle, seed: int, first: int, calls: int) -> FuzzReport:
    with grpc.insecure_channel(server.endpoint, NO_PROXY) as stream_channel:
        run = _Run(server, stream_channel, bundle, seed, first, calls)
        asyncio.run(run.drive())
    report = run.report
    if (status := server.process.poll()) is not None:
        report.failures.append(f"the server exited with status {status}")
        return report
    report.grown_kb = resident_kb(server.process.pid) - run.warm_kb
    if report.grown_kb > GROWTH_LIMIT_KB:
        report.failures.append(f"the server grew by {report.grown_kb} kB")
    return report


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class _Run:
    """Keeps :data:`CONCURRENT` calls in flight, with control requests before, between and after them.

    Control requests are valid and fixed: their answers must not change, whatever came before them. A round of them
    is sent with every :data:`CONTROL_EVERY`-th call, so that their number depends on the number of calls alone.
    """

    def __init__(
        self,
        server: ServerProcess,
        stream_channel: grpc.Channel,
        bundle: Bundle,
        seed: int,
        first: int,
        calls: int,
    ) -> None:
        self.report = FuzzReport()
        self.warm_kb = 0
        self._server, self._bundle = server, bundle
        self._calls = map(
            Fuzzer(bundle.spec, seed).call, range(first, first + calls)
        )  # shared by the workers
        self._warm_at = first + calls // 4
        self._controls = _controls(bundle.spec)
        self._expected: list[bytes] = []
        self._stream_channel = stream_channel

    async def drive(self) -> None:
        async with grpc.aio.insecure_channel(self._server.endpoint, NO_PROXY) as channel:
            try:
                self._expected = await self._ask_controls(channel)
                streams = asyncio.Semaphore(STREAMS)
                await asyncio.gather(*(self._work(channel, streams) for _ in range(CONCURRENT)))
                await self._control(channel)
            except grpc.RpcError as error:
                self.report.failures.append(f"a control request failed: {error}")

    async def _control(self, channel: Any) -> None:
        if await self._ask_controls(channel) != self._expected:
            self.report.failures.append("a control request is answered otherwise than before")

    async def _ask_controls(self, channel: Any) -> list[bytes]:
        self.report.controls += 1
        return [
            await channel.unary_unary(method)(data, timeout=DEADLINE_S) for method, data in self._controls
        ]

    async def _ask(self, channel: Any, call: Call) -> Outcome:
        if call.method == STREAM:
            return await asyncio.to_thread(_ask_stream, self._stream_channel, call.messages)
        try:
            return "OK", "", [await channel.unary_unary(call.method)(call.messages[0], timeout=DEADLINE_S)]
        except grpc.RpcError as error:
            return _refusal(error, [])

    async def _work(self, channel: Any, streams: asyncio.Semaphore) -> None:
        for call in self._calls:
            if call.index == self._warm_at:
                self.warm_kb = resident_kb(self._server.process.pid)
            if call.index % CONTROL_EVERY == 0:
                await self._control(channel)
            async with streams if call.method == STREAM else nullcontext():
                status, details, answers = await self._ask(channel, call)
            self.report.statuses[call.kind, status] += 1
            self.report.methods[call.method] += 1
            if wrong := _wrong(self._bundle, call, status, details, answers):
                self.report.failures.append(
                    f"call {call.index} ({call.kind}, {call.method}): {wrong}\n"
                    + "\n".join(
                        f"    {data[:PRINTED].hex()}{'…' * (len(data) > PRINTED)}" for data in call.messages
                    )
                )


def _ask_stream(channel: Any, messages: tuple[bytes, ...]) -> Outcome:
    # Not by grpc.aio, whose client reports INTERNAL if a stream ends while it still writes.
    answers: list[bytes] = []
    try:
        for answer in channel.stream_stream(STREAM)(iter(messages), timeout=DEADLINE_S):
            answers.append(answer)
    except grpc.RpcError as error:
        return _refusal(error, answers)
    return "OK", "", answers


def _refusal(error: Any, answers: list[bytes]) -> Outcome:
    return error.code().name, error.details() or "", answers


def _wrong(bundle: Bundle, call: Call, status: str, details: str, answers: list[bytes]) -> str | None:
    if status not in ALLOWED:
        return f"{status}: {details}"
    if call.kind == "valid" and status != "OK":
        return f"a valid request was refused with {status}: {details}"
    if status == "RESOURCE_EXHAUSTED" and max(map(len, call.messages)) <= MESSAGE_LIMIT:
        return f"a message of allowed size was refused: {details}"
    if status != "OK" and not 10 < len(details) <= 400:
        return f"details of {len(details)} characters: {details}"
    if str(bundle.path) in details or "Traceback" in details:
        return f"details tell of the server's inside: {details}"
    if len(answers) != len(call.messages) and status == "OK":
        return f"{len(answers)} answers to {len(call.messages)} messages"
    for data, answer in zip(call.messages, answers, strict=False):
        if wrong := complaint(bundle.spec, call.method, data, answer):
            return wrong
    return None


def _controls(spec: TeamSpec) -> list[tuple[str, bytes]]:
    """Return one fixed valid request per method, except for streams."""
    fuzzer = Fuzzer(spec, 0)
    requests: dict[str, bytes] = {}
    for call in map(fuzzer.call, range(10_000)):
        if call.kind == "valid" and call.method != STREAM:
            requests.setdefault(call.method, call.messages[0])
        if len(requests) == len(WEIGHTS) - 1:
            break
    return list(requests.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.fuzz", description="Fuzz a server of each kind of team."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=100_000, help="half to each of two servers")
    parser.add_argument("--team", choices=TEAMS, action="append", help="default: both")
    options = parser.parse_args()
    teams = options.team or list(TEAMS)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for team in teams:
            bundle = write_test_bundle(Path(folder) / team, TEAMS[team](), seed=1)
            report = fuzz(bundle, options.seed, options.first, -(-options.calls // len(teams)))
            for failure in report.failures:
                print(f"--team {team} --seed {options.seed} --first I --calls 1: {failure}")
            by_status = ", ".join(
                f"{kind} {status} {n}" for (kind, status), n in sorted(report.statuses.items())
            )
            print(f"{team}: {report.statuses.total()} calls ({by_status})")
            print(
                f"    {report.controls} rounds of control requests, grown by {report.grown_kb} kB, "
                f"{len(report.failures)} failures"
            )
            failed |= bool(report.failures)
    admin = fuzz_admin(options.seed, options.calls // ADMIN_SHARE)
    print("\n".join(f"administration: {failure}" for failure in admin.failures))
    by_status = ", ".join(f"{kind} {status} {n}" for (kind, status), n in sorted(admin.statuses.items()))
    print(f"administration: {admin.statuses.total()} calls ({by_status}), {len(admin.failures)} failures")
    return int(failed or bool(admin.failures))


if __name__ == "__main__":
    sys.exit(main())
