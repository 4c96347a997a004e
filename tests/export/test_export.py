"""Exported graphs against numpy, float64 and straight from the formulas; the writer against damage and misuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.bundle import MODEL_FILE, TEAM, Bundle, read_bundle
from omcda_deploy.errors import BundleError, ConfigError, ExportError
from omcda_deploy.export import bundle as writer
from omcda_deploy.export.bundle import export_bundle
from omcda_deploy.guard import DataReference
from omcda_deploy.local import JointTeam, LocalTeam, OnnxModel
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.spec import ActionSpec, AgentSpec, Normalizer, TeamSpec
from omcda_deploy.training.networks import CategoricalActor, GaussianActor

M = 1000
Array = NDArray[Any]


class Gaussian(nn.Module):
    """A linear ContinuousActor; its numpy twin is :func:`gaussian`."""

    def __init__(self, spec: TeamSpec, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        n, w, a = len(spec.agents), spec.observation_size, spec.action_size
        self.actions = a
        self.weight = nn.Parameter(torch.randn(n, w, 2 * a, generator=generator) / w)
        self.bias = nn.Parameter(torch.randn(n, 1, 2 * a, generator=generator) / 3)

    def forward(self, observation: Tensor, agent: int | None) -> tuple[Tensor, Tensor]:
        if agent is None:
            out = (observation.unsqueeze(-2) @ self.weight + self.bias).squeeze(-2)
        else:
            out = observation @ self.weight[agent] + self.bias[agent]
        return out[..., : self.actions], out[..., self.actions :]


class Categorical(Gaussian):
    def forward(self, observation: Tensor, mask: Tensor, agent: int | None) -> Tensor:  # type: ignore[override]
        available = mask.bool()
        none = ~available.any(-1, keepdim=True)
        available = torch.cat([available[..., :1] | none, available[..., 1:]], -1)
        logits = super().forward(observation, agent)[0] * 5
        return logits.masked_fill(~available, torch.finfo(torch.float32).min).log_softmax(-1)


def gaussian(actor: Gaussian, observation: Array, agent: int, actions: int) -> tuple[Array, Array]:
    weight, bias = actor.weight.detach().double().numpy(), actor.bias.detach().double().numpy()
    padded = np.zeros((len(observation), weight.shape[1]))
    padded[:, : observation.shape[1]] = observation
    out = padded @ weight[agent] + bias[agent]
    half = weight.shape[2] // 2
    return out[:, :actions], out[:, half : half + actions]


def standardized(x: Array) -> Array:
    x = x.astype(np.float64)
    result: Array = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return result


def team_spec(
    kind: Any = "continuous",
    observations: tuple[int, ...] = (5, 5),
    actions: tuple[int, ...] = (2, 2),
    normalizer: Any = "per-vector-standardize",
    low: float = -1.0,
    high: float = 1.0,
) -> TeamSpec:
    return TeamSpec(
        "test/team",
        tuple(
            AgentSpec(f"agent_{i}", o, ActionSpec(kind, a, low, high))
            for i, (o, a) in enumerate(zip(observations, actions, strict=True))
        ),
        state_size=3,
        control_rate=20.0,
        normalizer=Normalizer(normalizer),
    )


RAGGED: dict[str, Any] = {"observations": (4, 6, 3), "actions": (1, 3, 2)}


class Exported:
    """A bundle, what it was made from, and rows to ask it about."""

    def __init__(self, out: Path, spec: TeamSpec, kind: Any = "kl", **changes: Any) -> None:
        self.spec = spec
        actor = Gaussian if spec.action_kind == "continuous" else Categorical
        self.policy, self.behavior = actor(spec, 1), actor(spec, 2)
        generator = np.random.default_rng(0)
        shape = (M, len(spec.agents), spec.observation_size)
        self.observations = (3 * generator.standard_normal(shape) + 1).astype(np.float32)
        arguments: dict[str, Any] = {
            "observations": self.observations,
            "divergence_kind": kind,
            "budgets": {name: 0.25 for name in spec.names},
            "alphas": {name: 1.5 for name in spec.names},
            "provenance": {"algorithm": "test", "step": 7},
        }
        if spec.action_kind == "discrete":
            self.masks = generator.integers(0, 2, (M, len(spec.agents), spec.action_size), np.uint8)
            self.masks[:20] = 0
            arguments["action_masks"] = self.masks
        self.bundle: Bundle = export_bundle(out, spec, self.policy, self.behavior, **{**arguments, **changes})
        self.noise = NoiseSource(spec, 5).draw(M)
        self.own = {a.name: self.observations[:, i, : a.observation_size] for i, a in enumerate(spec.agents)}

    def ask(self, team: Callable[[Bundle], LocalTeam | JointTeam], noise: bool = True) -> dict[str, Decision]:
        masks = None
        if self.spec.action_kind == "discrete":
            masks = {a.name: self.masks[:, i, : a.action.size] for i, a in enumerate(self.spec.agents)}
        return team(self.bundle).act(self.own, noise=self.noise if noise else None, action_masks=masks)


Export = Callable[..., Exported]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports shared by the tests that only ask them."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[TeamSpec, str], Exported] = {}

    def get(spec: TeamSpec, kind: str = "kl") -> Exported:
        if (spec, kind) not in made:
            made[spec, kind] = Exported(folder / str(len(made)), spec, kind)
        return made[spec, kind]

    return get


@pytest.mark.parametrize("team", [LocalTeam, JointTeam])
@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("normalizer", ["none", "per-vector-standardize"])
def test_continuous_outputs_follow_the_formulas(
    export: Export, team: Any, sizes: Any, normalizer: Any
) -> None:
    exported = export(team_spec(normalizer=normalizer, low=-2.0, high=4.0, **sizes))
    noisy, still = exported.ask(team), exported.ask(team, noise=False)
    for i, agent in enumerate(exported.spec.agents):
        x = exported.own[agent.name]
        x = standardized(x) if normalizer != "none" else x
        mean, log_std = gaussian(exported.policy, x, i, agent.action.size)
        mean_b, log_std_b = gaussian(exported.behavior, x, i, agent.action.size)
        kl = (
            log_std_b
            - log_std
            + (np.exp(2 * log_std) + (mean - mean_b) ** 2) / (2 * np.exp(2 * log_std_b))
            - 0.5
        )
        u = mean + np.exp(log_std) * exported.noise[agent.name]
        got = noisy[agent.name]
        np.testing.assert_allclose(got.action, 1 + 3 * np.tanh(u), atol=1e-5)
        np.testing.assert_allclose(still[agent.name].action, 1 + 3 * np.tanh(mean), atol=1e-5)
        np.testing.assert_allclose(got.parameters["behavior_action"], 1 + 3 * np.tanh(mean_b), atol=1e-5)
        np.testing.assert_allclose(got.divergence, kl.sum(-1), atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(got.divergence, still[agent.name].divergence)
        for name, value in zip(
            ("mean", "log_std", "behavior_mean", "behavior_log_std"),
            (mean, log_std, mean_b, log_std_b),
            strict=True,
        ):
            np.testing.assert_allclose(got.parameters[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("team", [LocalTeam, JointTeam])
def test_neg_log_behavior_is_the_density_of_the_action_given(export: Export, team: Any) -> None:
    exported = export(team_spec(**RAGGED), "neg_log_behavior")
    for i, agent in enumerate(exported.spec.agents):
        decision = exported.ask(team)[agent.name]
        mean, log_std = gaussian(
            exported.behavior, standardized(exported.own[agent.name]), i, agent.action.size
        )
        action = decision.action.astype(np.float64)
        u = np.arctanh(action)
        log_density = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        log_density -= np.log1p(-(action**2))
        clear = (np.abs(action) < 0.99).all(-1)
        assert clear.sum() > M / 2
        np.testing.assert_allclose(
            decision.divergence[clear], -log_density.sum(-1)[clear], atol=1e-4, rtol=1e-5
        )


def test_saturated_actions_have_a_finite_density(export: Export) -> None:
    exported = export(team_spec(), "neg_log_behavior")
    noise = {name: np.full((1, 2), 60.0, np.float32) for name in exported.spec.names}
    rows = {name: own[:1] for name, own in exported.own.items()}
    for decision in LocalTeam(exported.bundle).act(rows, noise=noise).values():
        assert (decision.action == 1.0).all()
        assert np.isfinite(decision.divergence).all()


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["equal", "ragged"])
def test_raw_and_standardized_observations_act_alike(export: Export, sizes: Any) -> None:
    exported = export(team_spec(**sizes))
    normal = {name: standardized(own).astype(np.float32) for name, own in exported.own.items()}
    for team in (LocalTeam(exported.bundle), JointTeam(exported.bundle)):
        raw, standard = team.act(exported.own), team.act(normal)
        for name in exported.spec.names:
            assert not np.allclose(exported.own[name], normal[name], atol=0.1)
            np.testing.assert_allclose(raw[name].action, standard[name].action, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 100.1])
def test_a_constant_observation_counts_as_zeros(export: Export, value: float) -> None:
    exported = export(team_spec())
    team = LocalTeam(exported.bundle)
    constant = team.act({name: np.full(5, value, np.float32) for name in exported.spec.names})
    for i, name in enumerate(exported.spec.names):
        bias = exported.policy.bias.detach().numpy()[i, 0, :2]
        np.testing.assert_allclose(constant[name].action, np.tanh(bias), atol=1e-5)


@pytest.mark.parametrize("team", [LocalTeam, JointTeam])
@pytest.mark.parametrize(
    "sizes", [{"actions": (4, 4)}, {**RAGGED, "actions": (2, 4, 3)}], ids=["equal", "ragged"]
)
@pytest.mark.parametrize("kind", ["kl", "neg_log_behavior"])
def test_discrete_outputs_follow_the_formulas(export: Export, team: Any, sizes: Any, kind: Any) -> None:
    exported = export(team_spec("discrete", normalizer="none", **sizes), kind)
    decisions = exported.ask(team)
    rows = np.arange(M)
    for i, agent in enumerate(exported.spec.agents):
        size, got = agent.action.size, decisions[agent.name]
        mask = exported.masks[:, i, :size].astype(bool)
        nothing_available = ~mask.any(-1)
        assert nothing_available.sum() >= 20
        mask[nothing_available, 0] = True

        def log_softmax(actor: Gaussian, i: int = i, mask: Array = mask, size: int = size) -> Array:
            name = exported.spec.names[i]
            logits = np.where(mask, gaussian(actor, exported.own[name], i, size)[0] * 5, -np.inf)
            logits -= logits.max(-1, keepdims=True)
            result: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            return result

        log_p, log_b = log_softmax(exported.policy), log_softmax(exported.behavior)
        scores = log_p + exported.noise[agent.name]
        assert got.action.dtype == np.int64
        assert got.action.shape == (M,)
        assert (got.action[nothing_available] == 0).all()
        assert mask[rows, got.action].all()
        np.testing.assert_allclose(scores[rows, got.action], scores.max(-1), atol=1e-4)
        np.testing.assert_allclose(log_b[rows, got.parameters["behavior_action"]], log_b.max(-1), atol=1e-4)
        if kind == "kl":
            with np.errstate(invalid="ignore"):
                terms = np.where(mask, np.exp(log_p) * (log_p - log_b), 0.0)
            np.testing.assert_allclose(got.divergence, terms.sum(-1), atol=1e-5, rtol=1e-5)
        else:
            np.testing.assert_allclose(got.divergence, -log_b[rows, got.action], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(got.parameters["logits"][mask], log_p[mask], atol=1e-5)
        assert np.isfinite(got.parameters["logits"]).all()
        assert (np.exp(got.parameters["logits"][~mask]) == 0).all()


def test_a_behavior_policy_itself_is_computed_once_and_has_no_divergence(
    tmp_path: Path, export: Export
) -> None:
    spec = team_spec()
    two = export(spec)
    actor = Gaussian(spec, 1)
    nothing = dict.fromkeys(spec.names)
    one = export_bundle(
        tmp_path / "one",
        spec,
        actor,
        actor,
        observations=two.observations,
        divergence_kind="kl",
        budgets=nothing,
        alphas=nothing,
        provenance={},
    )

    def products(bundle: Bundle) -> int:
        graph = onnx.load(bundle.model_path("agent_0")).graph
        return sum(node.op_type in ("MatMul", "Gemm") for node in graph.node)

    assert (products(one), products(two.bundle)) == (1, 2)
    decision = LocalTeam(one).act(two.own, noise=two.noise)["agent_1"]
    assert (decision.divergence == 0).all()
    np.testing.assert_array_equal(decision.parameters["mean"], decision.parameters["behavior_mean"])


def test_manifest_and_reproducible_bytes(tmp_path: Path) -> None:
    spec = team_spec()
    first, second = Exported(tmp_path / "a", spec), Exported(tmp_path / "deep/er/b", spec)
    assert first.bundle.digest == second.bundle.digest
    manifest = first.bundle.manifest
    assert manifest["training"] == {"algorithm": "test", "step": 7}
    entry = manifest["agents"]["agent_1"]
    assert (entry["budget"], entry["alpha"]) == (0.25, 1.5)
    decision = LocalTeam(first.bundle).act(first.own)["agent_1"]
    reference = first.bundle.references["agent_1"]
    assert reference.divergence_p99 == pytest.approx(np.percentile(decision.divergence, 99), rel=1e-5)
    assert reference == DataReference.of(
        spec, spec.agent("agent_1"), first.own["agent_1"], decision.divergence
    )
    assert manifest["parity"]["rows"] == M
    assert 0 < manifest["parity"]["against_torch"]["action"]["max_abs"] <= 1e-5
    assert read_bundle(tmp_path / "a").spec == spec
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep"]
    for file in first.bundle.path.rglob("*"):
        assert file.is_dir() or str(Path.cwd()).encode() not in file.read_bytes()


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_triton_reads_the_configuration_and_it_fits_the_model(export: Export, kind: Any) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    exported = export(team_spec(kind, **RAGGED))
    for name in (*exported.spec.names, TEAM):
        text = (exported.bundle.path / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config.ModelConfig())
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 0)
        outputs = OnnxModel(exported.bundle.model_path(name)).run(
            {
                entry.name: np.ones(
                    [3 if dim == -1 else dim for dim in entry.dims],
                    np.uint8 if entry.data_type == model_config.TYPE_UINT8 else np.float32,
                )
                for entry in config.input
            }
        )
        types = {"float32": model_config.TYPE_FP32, "int64": model_config.TYPE_INT64}
        assert [entry.name for entry in config.output] == list(outputs)
        for entry in config.output:
            assert tuple(3 if dim == -1 else dim for dim in entry.dims) == outputs[entry.name].shape
            assert types[str(outputs[entry.name].dtype)] == entry.data_type


def damage(monkeypatch: pytest.MonkeyPatch, model: str, change: float) -> None:
    """Change the largest weight of one exported model, as a faulty exporter would."""
    trace = writer._trace

    def damaged(graph: Any, spec: TeamSpec, name: str, file: Path) -> onnx.ModelProto:
        proto = trace(graph, spec, name, file)
        if name == model:
            weight = max(proto.graph.initializer, key=lambda entry: math.prod(entry.dims))
            values = onnx.numpy_helper.to_array(weight).copy()
            values.flat[0] += change
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return proto

    monkeypatch.setattr(writer, "_trace", damaged)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("agent_1", 1e-3, r"of agent_1, observation \d+, .*onnxruntime gives \S+, torch \S+"),
        ("agent_1", math.nan, r"of agent_1, observation \d+"),
        (TEAM, 1e-3, r"of agent_0, observation \d+, .*the team's graph gives \S+, the agent's graph \S+"),
    ],
)
def test_a_wrong_graph_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, model: str, change: float, message: str
) -> None:
    damage(monkeypatch, model, change)
    with pytest.raises(ExportError, match=message):
        Exported(tmp_path / "b", team_spec(kind))
    assert not list(tmp_path.iterdir())


def test_a_baked_batch_size_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Gaussian.forward

    def baked(self: Gaussian, observation: Tensor, agent: int | None) -> tuple[Tensor, Tensor]:
        mean, log_std = forward(self, observation, agent)
        rows, *others = observation.detach().numpy().shape
        return mean + torch.zeros(rows, *(1 for _ in others)), log_std

    monkeypatch.setattr(Gaussian, "forward", baked)
    with (
        pytest.warns(Warning, match="NumPy array"),
        pytest.raises(ExportError, match="batches of 1 and of many"),
    ):
        Exported(tmp_path / "b", team_spec())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        Exported(tmp_path / "b", team_spec())
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence_kind": "js"}, "divergence_kind: expected one of kl, neg_log_behavior, got 'js'"),
        ({"budgets": {"agent_0": 1.0}}, "budgets: expected one for each of agent_0, agent_1"),
        ({"alphas": {}}, "alphas: expected one for each"),
        ({"observations": np.zeros((999, 2, 5))}, "at least 1000 rows, got 999"),
        ({"observations": np.zeros((1000, 2, 4))}, r"expected shape \[M, 2, 5\], got \[1000, 2, 4\]"),
        ({"observations": np.full((1000, 2, 5), np.nan)}, "finite"),
        ({"provenance": {"path": Path()}}, "JSON"),
        ({"alphas": dict.fromkeys(("agent_0", "agent_1"), math.inf)}, "finite JSON"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Exported(tmp_path / "b", team_spec(), **changes)
    assert not list(tmp_path.iterdir())


def test_discrete_actions_need_masks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"action_masks: .* expected shape \[1000, 2, 2\], got None"):
        Exported(tmp_path / "b", team_spec("discrete"), action_masks=None)


def test_the_trained_modules_are_left_alone(export: Export) -> None:
    exported = export(team_spec())
    assert exported.policy.training
    assert (exported.bundle.path / "agent_0" / MODEL_FILE).is_file()


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_trained_networks_leave_no_shape_arithmetic_to_the_request(tmp_path: Path, kind: Any) -> None:
    spec = team_spec(kind)
    network = GaussianActor if kind == "continuous" else CategoricalActor
    bundle = export_bundle(
        tmp_path / "b",
        spec,
        network(5, 2, 2, hidden=16),
        network(5, 2, 2, hidden=16),
        observations=np.random.default_rng(0).standard_normal((M, 2, 5)),
        action_masks=None if kind == "continuous" else np.ones((M, 2, 2), np.uint8),
        divergence_kind="kl",
        budgets=dict.fromkeys(spec.names),
        alphas=dict.fromkeys(spec.names),
        provenance={},
    )
    for model in (*spec.names, TEAM):
        operators = {node.op_type for node in onnx.load(bundle.model_path(model)).graph.node}
        assert not operators & {"Shape", "Expand", "ScatterND", "Range", "Pad"}


def test_a_steep_density_is_held_to_its_actions_exactness() -> None:
    """-log N(u; 0, 0.01) at u = 0.05 has the slope 500: 1e-5 in the mean is 5e-3 there, and no more is let pass."""
    agent = AgentSpec("agent_0", 3, ActionSpec("continuous", 1))
    rows = {"mean": 0.05, "log_std": -20.0, "behavior_mean": 0.0, "behavior_log_std": math.log(0.01)}
    want = {name: np.full((1, 1), value, np.float32) for name, value in rows.items()}
    want |= {"action": np.tanh(want["mean"]), "behavior_action": np.zeros((1, 1), np.float32)}
    want["divergence"] = np.array([10.0], np.float32)
    noise = np.zeros((1, 1), np.float32)

    def compare(kind: Any, error: float) -> None:
        comparison = writer._Comparison("a", "b", writer._TEAM, writer._TEAM, kind)
        comparison.check(agent, "zero noise", noise, want | {"divergence": want["divergence"] + error}, want)

    compare("neg_log_behavior", 4e-3)
    with pytest.raises(ExportError, match="divergence of agent_0"):
        compare("neg_log_behavior", 8e-3)
    with pytest.raises(ExportError, match="divergence of agent_0"):
        compare("kl", 1e-3)
