"""Servers that record: the step's path, kill -9, switching while they run, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.blend import Gaussians, Joined
from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.cli import app
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.remote import RemotePolicy
from omcda_deploy.errors import EndpointError
from omcda_deploy.guard import GuardSetting
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.recordings.densities import Densities
from omcda_deploy.recordings.reader import SegmentContents, find_segments, read_segment
from omcda_deploy.recordings.recorder import QUEUE
from omcda_deploy.recordings.segments import RecordingLimits
from omcda_deploy.serve.config import ServerConfig, read_server_config
from omcda_deploy.serve.oip import InferenceService
from omcda_deploy.serve.policy_service import PolicyService, StreamMemory
from omcda_deploy.serve.recording import FlightRecorder
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.status import RequestError
from tests.support.server_process import free_port, server_process

AGENT = "agent_1"


def segments_of(folder: Path) -> dict[str, SegmentContents]:
    """Return the last segment by model."""
    read = [read_segment(path) for path in find_segments([folder])]
    return {segment.metadata.get("model", "reports"): segment for segment in read if segment is not None}


class Recording:
    """Services of one process that record into ``folder``."""

    def __init__(self, bundle: Bundle, folder: Path, config: ServerConfig | None = None) -> None:
        self.folder, self.spec = folder, bundle.spec
        releases = Releases(bundle.path, (), config or ServerConfig())
        self.recorder = releases.recorder = FlightRecorder(RecordingLimits())
        self.recorder.start(folder)
        self.policies, self.inference = PolicyService(releases), InferenceService(releases)

    def act(self, model: str = AGENT, seed: int = 0, batch: int = 2, **fields: Any) -> policy_pb2.ActResponse:
        return policy_pb2.ActResponse.FromString(
            self.policies.act(self.request(model, seed, batch, **fields))
        )

    def request(
        self, model: str = AGENT, seed: int = 0, batch: int = 2, **fields: Any
    ) -> policy_pb2.ActRequest:
        agents = self.spec.agents if model == TEAM else (self.spec.agent(model),)
        draw = np.random.default_rng(seed)
        sizes = sum(a.observation_size for a in agents), sum(a.action.size for a in agents)
        observation, noise = (draw.standard_normal((batch, size)).astype(np.float32) for size in sizes)
        if agents[0].action.kind == "discrete":
            fields["action_mask"] = bytes([1] * batch * sizes[1])
        tensors = {"observation": observation.tobytes(), "noise": noise.tobytes()} | fields
        return policy_pb2.ActRequest(model=model, batch=batch, **tensors)

    def stop(self) -> dict[str, SegmentContents]:
        self.recorder.stop()
        return segments_of(self.folder)


def test_every_answer_is_recorded_as_it_was_sent(continuous_bundle: Bundle, tmp_path: Path) -> None:
    recording = Recording(continuous_bundle, tmp_path)
    origin: dict[str, Any] = {"episode_id": "flight 7", "temperature": 0.5}
    answers = [recording.act(seed=step, episode_step=step, **origin) for step in range(5)]
    quiet = recording.act(noise=b"", batch=1)
    team = recording.act(TEAM, batch=3)
    segments = recording.stop()
    columns = segments[AGENT].columns
    assert columns["episode_id"].tolist() == ["flight 7"] * 10 + [""]
    assert columns["episode_step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0]
    assert columns["row"].tolist() == [0, 1] * 5 + [0]
    assert columns["temperature"].tolist() == [0.5] * 10 + [0.0]
    assert not columns["noise"][-1].any()
    for name in (
        "action",
        "mean",
        "log_std",
        "behavior_mean",
        "behavior_log_std",
        "divergence",
        "policy_weight",
    ):
        sent = b"".join(getattr(answer, name) for answer in (*answers, quiet))
        assert columns[name].tobytes() == sent
    sent = b"".join(recording.request(seed=step).observation for step in range(5))
    assert columns["observation"][:10].tobytes() == sent
    assert segments[TEAM].columns["action"].tobytes() == team.action
    assert segments[TEAM].columns["log_prob"].shape == (3, len(recording.spec.agents))
    assert np.isnan(segments[TEAM].columns["temperature"]).all(), "noise of which nobody knows the factor"
    metadata = segments[AGENT].metadata
    assert (metadata["version"], metadata["bundle_digest"]) == ("1", continuous_bundle.digest)
    assert json.loads(metadata["guards"])[AGENT]["mode"] == "observe"
    now = time.time_ns()
    assert (np.abs(columns["time"] - now) < 60e9).all()


def test_calls_of_the_open_protocol_and_of_streams_are_recorded(
    discrete_bundle: Bundle, tmp_path: Path
) -> None:
    recording = Recording(discrete_bundle, tmp_path)
    agent = discrete_bundle.spec.agent(AGENT)
    request = oip.ModelInferRequest(model_name=AGENT)
    for name, kind, values in (
        ("observation", "FP32", np.ones((1, agent.observation_size), np.float32)),
        ("action_mask", "UINT8", np.ones((1, agent.action.size), np.uint8)),
    ):
        request.inputs.add(name=name, datatype=kind, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
    recording.inference.model_infer(oip.ModelInferRequest.FromString(request.SerializeToString()))
    request.parameters["episode_id"].string_param = "e"
    request.parameters["episode_step"].int64_param = 3
    request.parameters["of no interest"].bool_param = True
    recording.inference.model_infer(request)
    stream = StreamMemory(recording.policies.act)
    step = recording.request(batch=1, step_id=4, episode_id="s", episode_step=1)
    assert stream(step) == stream(step)  # asked again, and run once
    for name, field, value in (
        ("episode_id", "int64_param", 3),
        ("episode_step", "int64_param", -1),
        ("temperature", "string_param", "1"),
        ("episode_id", "string_param", "x" * 101),
    ):
        wrong = oip.ModelInferRequest()
        wrong.CopyFrom(request)
        setattr(wrong.parameters[name], field, value)
        with pytest.raises(RequestError, match=name):
            recording.inference.model_infer(wrong)
    with pytest.raises(RequestError, match="episode_id: expected at most 100"):
        recording.act(episode_id="x" * 101)
    columns = recording.stop()[AGENT].columns
    assert columns["episode_id"].tolist() == ["", "e", "s"]
    assert columns["episode_step"].tolist() == [0, 3, 1]
    assert (columns["action_mask"] == 1).all()


@pytest.mark.parametrize("mode", ["fallback", "blend"])
def test_what_a_guard_executed_is_known(continuous_bundle: Bundle, tmp_path: Path, mode: Any) -> None:
    """The distribution that acted gives the action that was answered, and its density is the blend's."""
    guards = {name: GuardSetting(mode, 0.2) for name in continuous_bundle.spec.names}
    recording = Recording(continuous_bundle, tmp_path, ServerConfig(guards=guards))
    for seed in range(40):
        recording.act(TEAM, seed=seed)
    columns = recording.stop()[TEAM].columns
    agents = continuous_bundle.spec.agents
    densities, joined = Densities(agents), Joined.of([agent.action.size for agent in agents])
    acted = densities.executed(columns)
    weight = columns["policy_weight"]
    assert {"fallback": weight == 0, "blend": (weight > 0) & (weight < 1)}[mode].mean() > 0.2
    assert (weight == 1).any()
    noise = columns["noise"].astype(np.float64)
    assert columns["action"] == pytest.approx(
        np.tanh(acted["mean"] + np.exp(acted["log_std"]) * noise), abs=1e-5
    )
    parameters = (
        columns[n].astype(np.float64) for n in ("mean", "log_std", "behavior_mean", "behavior_log_std")
    )
    blends = Gaussians(joined, *parameters)
    assert blends.act(weight.astype(np.float64), noise) == pytest.approx(columns["action"], abs=1e-5)
    hot = densities.executed(columns, np.full((len(noise), 1), 0.5))
    assert hot["log_std"] == pytest.approx(acted["log_std"] - np.log(2))
    # log N(u) - log(1 - tanh(u)^2), summed over an agent's entries.
    u = np.arctanh(np.clip(columns["action"].astype(np.float64), -1 + 1e-9, 1 - 1e-9))
    z = (u - acted["mean"]) / np.exp(acted["log_std"])
    terms = -0.5 * z**2 - acted["log_std"] - 0.5 * np.log(2 * np.pi) - np.log1p(-(np.tanh(u) ** 2))
    near = joined.sum((np.abs(columns["action"]) > 0.99).astype(np.float64)) == 0
    log_prob = densities.log_prob(columns, acted)
    assert log_prob[near] == pytest.approx(joined.sum(terms)[near], abs=2e-3)
    policy = densities.log_prob(columns, {"mean": columns["mean"], "log_std": columns["log_std"]})
    assert np.array_equal(policy, columns["log_prob"])


def test_steps_are_answered_while_the_disk_blocks(
    continuous_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omcda_deploy.recordings.recorder.FLUSH_S", 0.01)
    monkeypatch.setattr("omcda_deploy.recordings.recorder.QUEUE_BYTES", 1 << 18)
    recording = Recording(continuous_bundle, tmp_path)
    recording.act()
    blocked = threading.Event()
    monkeypatch.setattr("omcda_deploy.recordings.segments.os.fsync", lambda file: blocked.wait())
    for step in range(1000):
        recording.act(seed=step)
    tally = recording.recorder.tally
    assert tally.lost[QUEUE] > 500
    blocked.set()
    segment = recording.stop()[AGENT]
    assert segment.rows + tally.lost.total() == 2002
    assert segment.lost == tally.lost.total()


def test_a_version_that_is_unloaded_is_freed(continuous_bundle: Bundle, tmp_path: Path) -> None:
    recording = Recording(continuous_bundle, tmp_path)
    recording.act()
    releases = recording.policies._releases
    gone = ref(releases.find(AGENT, ""))
    releases._slots.clear()
    assert gone() is None
    recording.stop()


def test_kill_9_loses_at_most_the_last_second(continuous_bundle: Bundle, tmp_path: Path) -> None:
    agent = continuous_bundle.spec.agent(AGENT)
    observation = np.ones(agent.observation_size, np.float32)
    with (
        server_process(continuous_bundle, AGENT, options=("--record", str(tmp_path))) as server,
        RemotePolicy(server.endpoint, temperature=1.0) as policy,
    ):
        policy.reset(episode_id="flight")
        answered: list[float] = []
        while len(answered) <= 100 or time.time_ns() - answered[50] < 1.5e9:
            policy.act(observation)
            answered.append(time.time_ns())
        server.process.kill()
        killed = time.time_ns()
        server.process.wait()
    segment = segments_of(tmp_path)[AGENT]
    assert not segment.closed
    steps = segment.columns["episode_step"].tolist()
    assert steps == list(range(1, len(steps) + 1))
    assert segment.lost == 0
    safe = sum(moment < killed - 1e9 for moment in answered)
    assert safe > 50
    assert len(steps) >= safe


@pytest.fixture
def administered(continuous_bundle: Bundle, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """A server's endpoint, its admin port and its log."""
    admin, log = free_port(), tmp_path / "log"
    options = ("--admin-port", str(admin), "--metrics-port", str(free_port()), "--log-json")
    with server_process(continuous_bundle, AGENT, options=options, log=log) as server:
        yield server.endpoint, f"127.0.0.1:{admin}", log


def test_recording_is_switched_while_steps_go_on(
    administered: tuple[str, str, Path], continuous_bundle: Bundle, tmp_path: Path
) -> None:
    endpoint, admin, log = administered
    observation = np.ones(continuous_bundle.spec.agent(AGENT).observation_size, np.float32)
    runner = CliRunner()

    def release(*arguments: str, status: int = 0) -> str:
        result = runner.invoke(app, ["release", "record", *arguments, "--admin", admin])
        assert result.exit_code == status or isinstance(result.exception, EndpointError), result.output
        return result.output + str(result.exception or "")

    with RemotePolicy(endpoint) as policy:
        policy.act(observation)
        release(str(tmp_path / "first"))
        for _ in range(3):
            policy.act(observation)
        assert "expected an absolute folder" in release("relative", status=1)
        assert "FAILED_PRECONDITION" in release("/proc/nowhere", status=1)
        policy.act(observation)  # into the first folder, as before
        release(str(tmp_path / "second"))
        policy.act(observation)
        release("off")
        policy.act(observation)
    assert segments_of(tmp_path / "first")[AGENT].rows == 4
    second = segments_of(tmp_path / "second")[AGENT]
    assert (second.rows, second.closed) == (1, True)
    with TeamAdmin([admin]) as team:
        (status,) = team.status().values()
    assert (status.recording, status.recorded_rows, status.lost_rows) == ("", 5, 0)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    audited = [(line.get("folder", ""), line["outcome"]) for line in lines if line.get("call") == "Record"]
    refused, taken = "FAILED_PRECONDITION", "OK"
    assert audited == [
        (str(tmp_path / "first"), taken),
        ("relative", refused),
        ("/proc/nowhere", refused),
        (str(tmp_path / "second"), taken),
        ("", taken),
    ]


def test_all_servers_record_or_none(administered: tuple[str, str, Path], tmp_path: Path) -> None:
    _, admin, _ = administered
    with (
        TeamAdmin([admin, f"127.0.0.1:{free_port()}"]) as team,
        pytest.raises(EndpointError, match="1 servers"),
    ):
        team.record(str(tmp_path / "recording"))
    with TeamAdmin([admin]) as team:
        (status,) = team.status().values()
    assert status.recording == ""


def start(bundle: Bundle, *options: str, module: str = "omcda_deploy.serve") -> tuple[int, str]:
    command = [sys.executable, "-m", module, *options, str(bundle.path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "", "it has served"
    return result.returncode, result.stderr


def test_a_wrong_folder_is_refused_before_anything_is_served(
    continuous_bundle: Bundle, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    config = tmp_path / "serve.toml"
    config.write_text('[recording]\nfolder = "file"\n')
    for options, message in (
        (("--record", str(file)), "is a file: expected a folder to record into"),
        (("--record", "/proc/nowhere"), "cannot write"),
        (("--config", str(config)), "is a file: expected a folder to record into"),
    ):
        status, told = start(continuous_bundle, *options)
        assert (status, told.count("\n")) == (2, 1)
        assert message in told


def test_the_configuration_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    for text, message in (
        ("size_mb = 1", "size_mb: expected a whole number from 8 on"),
        ("sizes = 1", "unknown entry of .recording. 'sizes'"),
        ("folder = 3", "recording.folder: expected the name of a folder"),
    ):
        file.write_text(f"[recording]\n{text}\n")
        with pytest.raises(Exception, match=message):
            read_server_config(file)
    file.write_text('[recording]\nfolder = "here"\nsize_mb = 64\nsegment_s = 30\n')
    config = read_server_config(file)
    assert (config.record_folder, config.recording) == (tmp_path / "here", RecordingLimits(64, 30))
