"""Training on a GPU, as far as a CPU can tell: steps replayed from a record, and every tensor on the one device.

A CUDA graph repeats kernels on the memory of its capture, without any Python. :class:`Tape` does the same with
torch's operations. Tensors of torch's ``meta`` device have no values that Python could look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from omcda_deploy import registry
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.envs import toy
from omcda_deploy.errors import ConfigError
from omcda_deploy.play.collect import collect
from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import ActionKind
from omcda_deploy.training import prices, request
from omcda_deploy.training.algorithm import Algorithm, create_algorithm
from omcda_deploy.training.algorithms import omcda
from omcda_deploy.training.batches import TransitionSampler
from omcda_deploy.training.cuda_graph import WARM_UP, GraphedSteps, Operations
from omcda_deploy.training.networks import NetworkFactory
from tests.support.synthetic import differing, write_dataset

KINDS: tuple[ActionKind, ...] = ("continuous", "discrete")
CASES = [
    (name, kind) for name in registry.algorithms() for kind in KINDS if kind in load_algorithm(name).ACTIONS
]
# OMCDA in all its plans within the steps of a test.
QUICK: dict[str, dict[str, Any]] = {
    "omcda": {"reallocate_every": 3, "warmup": 0.4, "lr_alpha": 0.05, "settled": 0.0}
}
VARIANTS = [
    *((name, kind, QUICK.get(name, {})) for name, kind in CASES),
    ("omcda", "continuous", {**QUICK["omcda"], "decoupled": False, "metric": "fisher"}),
    ("omcda", "discrete", {**QUICK["omcda"], "value_start": "zero"}),
    *(
        ("omcda", kind, {**QUICK["omcda"], "price": "solved", **settings})
        for kind, settings in (("continuous", {"clip_targets": True}), ("discrete", {"d_eval": 0.1}))
    ),
    ("cfcql", "continuous", {"mixer": "qmix"}),
    ("cql", "continuous", {"importance_correction": True, "improvement": "q_weighted_cloning"}),
    ("comadice", "continuous", {"initial_states": "first", "paper_code_vloss": True, "f_divergence": "kl"}),
    ("icq", "continuous", {"as_released": True}),
    ("bcq", "continuous", {"mixer": "qmix", "latent": "team"}),
]
SEEDS, BATCH, STEPS, WATCH_EVERY = (3, 5), 8, 60, 7


@pytest.fixture(autouse=True)
def prices_are_solved_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omcda, "SOLVE_EVERY", 6)
    for module in (omcda, prices):
        monkeypatch.setattr(module, "WINDOW", 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[ActionKind, Path]:
    """Hopper's shapes with random numbers, and a game's own data."""
    folder = tmp_path_factory.mktemp("data")
    continuous = write_dataset(
        folder / "hopper.hdf5", registry.team_spec("mamujoco/hopper-3x1"), [40, 20], reward_scale=0.1
    )
    collect(
        "toy/chain",
        toy.behavior_team("toy/chain"),
        folder / "chain.hdf5",
        transitions=60,
        seed=0,
        behavior="behavior",
        workers=0,
    )
    return {"continuous": continuous, "discrete": folder / "chain.hdf5"}


def prepared(
    name: str, path: Path, settings: dict[str, Any], device: str = "cpu"
) -> tuple[Algorithm, TransitionSampler]:
    """A fleet of small networks with its sampler, as training makes them."""
    torch.set_num_threads(1)
    dataset = read(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        behavior = NetworkFactory(dataset.spec, 8).actor().requires_grad_(False).to(device)
    algorithm = create_algorithm(
        name,
        dataset.spec,
        [behavior] * len(SEEDS),
        settings=[{"hidden": 8, "batch_size": BATCH, **settings}] * len(SEEDS),
        steps=STEPS,
        seeds=SEEDS,
        device=device,
    )
    return algorithm, TransitionSampler(
        dataset, BATCH, SEEDS, device=device, behaviors=[behavior] * len(SEEDS)
    )


# -- replay -----------------------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations while they run; :meth:`replay` does them again with the same tensors, in and out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(result)
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in memory]  # no views of the inputs
        self._calls.append((func, args, kwargs or {}, fresh))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self._calls:
                result = tensors_of(func(*args, **kwargs))
                if fresh:
                    for recorded, again in zip(fresh, result, strict=True):
                        recorded.copy_(again)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class TapeRecorder:
    """Captures operations on a tape, and counts."""

    def __init__(self) -> None:
        self.executed = 0
        self.generators: list[Sequence[torch.Generator]] = []

    def execute(self, operations: Operations) -> dict[str, Tensor]:
        self.executed += 1
        return operations()

    def capture(self, operations: Operations, generators: Sequence[torch.Generator]) -> Operations:
        self.generators.append(generators)
        tape, metrics = Tape(), dict[str, Tensor]()

        def replay() -> dict[str, Tensor]:
            if metrics:
                tape.replay()
            else:  # A capture runs nothing; this stand-in records as it runs for the first time.
                with tape:
                    metrics.update(operations())
            return metrics

        return replay


@pytest.mark.parametrize(("name", "kind", "settings"), VARIANTS)
def test_replayed_steps_are_those_of_python(
    files: dict[ActionKind, Path], name: str, kind: ActionKind, settings: dict[str, Any]
) -> None:
    """Metrics and states to the last bit, through every plan."""
    eager, sampler = prepared(name, files[kind], settings)
    graphed, other = prepared(name, files[kind], settings)
    recorder = TapeRecorder()
    steps = GraphedSteps(graphed, other, recorder)
    plans = Counter[Hashable]()
    for step in range(STEPS if name == "omcda" else WARM_UP + 3):
        watched = step % WATCH_EVERY == 0
        plan = eager.begin(watched)
        plans[plan] += 1
        ours, theirs = steps(watched), eager.compute(sampler.sample(step), plan)
        assert differing(ours, theirs) == set(), step
    for run in range(len(SEEDS)):
        assert differing(graphed.state_dict(run), eager.state_dict(run)) == set()
    assert len(recorder.generators) == sum(count > WARM_UP for count in plans.values())
    assert recorder.executed == sum(min(count, WARM_UP) for count in plans.values())
    assert (len(recorder.generators) > 4) == (name == "omcda")
    for generators in recorder.generators:
        assert len(generators) == (len(SEEDS) if graphed.noise else 0)


def test_a_fleet_that_was_resumed_is_captured_anew(files: dict[ActionKind, Path]) -> None:
    settings = QUICK["omcda"]
    eager, sampler = prepared("omcda", files["continuous"], settings)
    for step in range(10):
        eager.update(sampler.sample(step), step % WATCH_EVERY == 0)
    graphed, other = prepared("omcda", files["continuous"], settings)
    graphed.load_state_dicts([eager.state_dict(run) for run in range(len(SEEDS))])
    eager.load_state_dicts(
        [eager.state_dict(run) for run in range(len(SEEDS))]
    )  # forgets what was to be watched
    steps = GraphedSteps(graphed, other, TapeRecorder())
    for step in range(10, STEPS):
        watched = step % WATCH_EVERY == 0
        assert differing(steps(watched), eager.update(sampler.sample(step), watched)) == set(), step


# -- devices ----------------------------------------------------------------------------------------------------


class OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on tensors elsewhere than on ``meta``, but for numbers, which any device takes from the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of((args, kwargs, result)):
            assert tensor.is_meta or tensor.ndim == 0, f"{func} has a tensor on {tensor.device}"
        return result


class MetaAdam:
    """Adam's place and state; its own refuses ``meta``."""

    def __init__(self, groups: Any, **options: Any) -> None:
        self.param_groups = groups
        self.state: dict[Tensor, Any] = {}

    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                matrix.data.add_(matrix.grad)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``meta`` stand for a GPU where torch tells devices apart."""
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make())
    monkeypatch.setattr(torch.optim, "Adam", MetaAdam)


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(("name", "kind", "settings"), VARIANTS)
def test_a_step_is_on_one_device_and_asks_it_for_nothing(
    files: dict[ActionKind, Path], name: str, kind: ActionKind, settings: dict[str, Any]
) -> None:
    """``meta`` has no values: item(), bool(), nonzero() and shapes that depend on data raise."""
    algorithm, sampler = prepared(name, files[kind], settings, device="meta")
    for step in range(7):
        plan = algorithm.begin(step % 3 == 0)
        positions = sampler.positions(step)
        with OneDevice():
            metrics = algorithm.compute(sampler.gather(positions), plan)
        assert all(metric.is_meta for metric in metrics.values())
    for module in (algorithm.policy, getattr(algorithm, "online", algorithm.policy)):
        assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


LOOKS: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("item", lambda x: x.sum().item()),
    ("float", lambda x: float(x.sum())),
    ("bool", lambda x: bool((x > 0).any())),
    ("nonzero", lambda x: x.nonzero()),
    ("mask", lambda x: x[x > 0]),
    ("tolist", lambda x: x.tolist()),
    ("default device", lambda x: torch.ones(3)),
    ("another device", lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64))),
    ("copy", lambda x: x.cpu()),
]


@pytest.mark.parametrize(("name", "look"), LOOKS)
def test_what_a_graph_cannot_hold_is_seen(name: str, look: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OneDevice():
        look(torch.empty(3, device="meta"))


# -- machines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:2", r"device: expected cuda:0 to cuda:1, as this machine has, got 'cuda:2'"),
        ("cuda:-1", r"device: expected cpu, cuda or cuda:N, got 'cuda:-1'"),
        ("cuda:", r"device: expected cpu, cuda or cuda:N, got 'cuda:'"),
        ("cuda1", r"device: expected cpu, cuda or cuda:N, got 'cuda1'"),
        ("CPU", r"device: expected cpu, cuda or cuda:N, got 'CPU'"),
        ("", r"device: expected cpu, cuda or cuda:N, got ''"),
    ],
)
def test_devices_that_do_not_exist_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        request.check_device(device)
    for right in ("cpu", "cuda", "cuda:0", "cuda:1"):
        request.check_device(right)
