"""Networks and random numbers of many runs at once are those of each run alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omcda_deploy.training import mlp
from omcda_deploy.training.distributions import TanhGaussian
from omcda_deploy.training.fleet import Noise, load_run_states, mean_per_run, run_state, stack
from omcda_deploy.training.mlp import AgentMLP, Linear
from omcda_deploy.training.networks import NetworkFactory
from tests.support.synthetic import continuous_spec, differing

# -- networks -------------------------------------------------------------------------------------------------

# Largest numbers of hidden values of runs that share their operations, and of a block.
BLOCKS = [(10**6, 1), (0, 10**6), (0, 1), (0, 85)]  # all at once; a run, one state, two states at a time
SHAPES = [(1, 4, 1), (1, 4, 3), (3, 4, 1), (3, 1, 3), (1, 1, 1)]  # runs, inputs, outputs


def agent_mlps(runs: int, inputs: int, outputs: int) -> list[AgentMLP]:
    """One network of two agents per run, in float64."""
    torch.manual_seed(runs + inputs + outputs)
    return [AgentMLP(inputs, outputs, agents=2, hidden=5).double() for _ in range(runs)]


def divide(monkeypatch: pytest.MonkeyPatch, shared: int, block: int) -> None:
    monkeypatch.setattr(mlp, "_SHARED", shared)
    monkeypatch.setattr(mlp, "_BLOCK", block)


def parameters_in_order(network: AgentMLP) -> list[Tensor]:
    return [
        network.identity,
        *(p for layer in (network.first, network.second, network.last) for p in layer.parameters()),
    ]


@pytest.mark.parametrize(("runs", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_gradients_of_stacked_networks_are_right(
    runs: int, inputs: int, outputs: int, width: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With branches of ``width`` numbers, and without any."""
    divide(monkeypatch, *blocks)
    parameters = parameters_in_order(stack(agent_mlps(runs, inputs + width, outputs)))
    x = torch.randn(runs, 3, 2, inputs, dtype=torch.float64, requires_grad=True)
    leaves = [x, *parameters]
    if width:
        leaves.insert(1, torch.randn(runs, 3, 2, 4, width, dtype=torch.float64, requires_grad=True))

    def network(x: Tensor, *rest: Tensor) -> Any:
        branches, own = (rest[0], rest[1:]) if width else (None, rest)
        return mlp._StackedMLP.apply(True, x, branches, *own)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(network, leaves)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("wanted", ["x", "branches", "parameters", "x and branches"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
    branched: bool, wanted: str, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, *blocks)
    network = stack(agent_mlps(3, 5, 2))
    x = torch.randn(3, 4, 2, 3 if branched else 5, dtype=torch.float64)
    branches = torch.randn(3, 6, 4, 2, 2, dtype=torch.float64)

    def gradients(*chosen: str) -> dict[str, Tensor]:
        leaves = {"x": x.clone(), "branches": branches.clone(), **dict(network.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in chosen or (name not in ("x", "branches") and "parameters" in chosen))
        output = network.branch(leaves["x"], leaves["branches"]) if branched else network(leaves["x"])
        network.zero_grad(set_to_none=True)
        if output.requires_grad:
            output.sin().sum().backward()
        return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}

    every, some = gradients("x", "branches", "parameters"), gradients(*wanted.split(" and "))
    expected = {"parameters": set(dict(network.named_parameters()))}.get(wanted, set(wanted.split(" and ")))
    assert set(some) == expected - (set() if branched else {"branches"})
    assert differing(some, {name: every[name] for name in some}) == set()


@pytest.mark.parametrize(("runs", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_stacked_network_is_its_runs_networks(
    runs: int, inputs: int, outputs: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written-out backward against autograd's, run by run, with and without branches."""
    divide(monkeypatch, *blocks)
    for branched in (False, True):
        networks = agent_mlps(runs, inputs + 2 * branched, outputs)
        together = stack(networks)
        x = torch.randn(runs, 3, 2, inputs, dtype=torch.float64, requires_grad=True)
        branches = torch.randn(runs, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        leaves = (x, branches) if branched else (x,)
        output = together.branch(x, branches) if branched else together(x)
        with torch.no_grad():
            again = together.branch(x, branches) if branched else together(x)
        assert torch.equal(again, output)
        ours = torch.autograd.grad(output.sin().sum(), (*leaves, *together.parameters()))
        for run, network in enumerate(networks):
            own = network.branch(x[run], branches[run]) if branched else network(x[run])
            torch.testing.assert_close(output[run], own, rtol=1e-12, atol=1e-12)
            theirs = torch.autograd.grad(own.sin().sum(), (*leaves, *network.parameters()))
            for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                b = b[run] if index < len(leaves) else b
                torch.testing.assert_close(a[run], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("hidden", [16, 160])  # 160: products as oneDNN does them
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("blocks", [(10**6, 1), (0, 10**6), (0, 9000)])
def test_a_runs_bits_are_those_of_company(
    outputs: int, hidden: int, branched: bool, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, *blocks)
    torch.manual_seed(0)
    networks = [AgentMLP(19 + 2 * branched, outputs, agents=3, hidden=hidden) for _ in range(5)]
    x, branches = torch.randn(5, 17, 3, 19), torch.randn(5, 4, 17, 3, 2)
    results = []
    for runs in (slice(0, 1), slice(0, 5)):
        network = stack(networks[runs])
        inputs = x[runs].requires_grad_()
        values = network.branch(inputs, branches[runs]) if branched else network(inputs)
        results.append([values, *torch.autograd.grad(values.square().sum(), [inputs, *network.parameters()])])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone[0], together[0])


def test_a_stacked_layer_is_its_runs_layers() -> None:
    torch.manual_seed(0)
    layers = [Linear(4, 3).double() for _ in range(3)]
    together = stack(layers)
    x = torch.randn(3, 6, 2, 4, dtype=torch.float64)
    for run, layer in enumerate(layers):
        torch.testing.assert_close(together(x)[run], layer(x[run]), rtol=1e-12, atol=1e-12)
        assert differing(run_state(together, run), layer.state_dict()) == set()


# -- stacking -------------------------------------------------------------------------------------------------


def test_a_run_starts_from_its_own_seed_whatever_its_company() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fleet = NetworkFactory(continuous_spec(), 8, [3, 9, 3])
    ours = [fleet.q(), fleet.actor(), fleet.mixer(8)]
    assert torch.equal(torch.get_rng_state(), before)
    for run, seed in enumerate((3, 9, 3)):
        torch.manual_seed(seed)
        plain = NetworkFactory(continuous_spec(), 8)
        for together, alone in zip(ours, (plain.q(), plain.actor(), plain.mixer(8)), strict=True):
            assert differing(run_state(together, run), alone.state_dict()) == set()


def test_a_stacked_module_has_parameters_of_its_own() -> None:
    one = nn.Linear(2, 2).requires_grad_(False)
    many = stack([one] * 3)
    assert many.weight.shape == (3, 2, 2)
    assert not many.weight.requires_grad
    many.weight.add_(1.0)
    assert torch.equal(run_state(many, 2)["weight"], one.weight + 1.0)


def test_states_of_runs_are_loaded_in_their_order() -> None:
    modules = [NetworkFactory(continuous_spec(), 8).divergence_mixer("learned", 4) for _ in range(3)]
    together = stack(modules)
    other = copy.deepcopy(together)
    load_run_states(other, [run_state(together, run) for run in (2, 0, 1)])
    for position, run in enumerate((2, 0, 1)):
        assert differing(run_state(other, position), modules[run].state_dict()) == set()


def test_a_mean_per_run_is_that_of_everything_else() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    assert mean_per_run(values).tolist() == [5.5, 17.5]


# -- random numbers -------------------------------------------------------------------------------------------


def test_each_run_draws_the_numbers_of_its_own_generator() -> None:
    seeds = (11, 4, 11)
    noise = Noise(seeds)
    for step in (0, 7, 7, 3):
        at = noise.at(step)
        ours = [at.normal(2, 5), at.uniform(3), at.normal(4)]
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            theirs = [
                torch.randn(2, 5, generator=generator),
                torch.rand(3, generator=generator),
                torch.randn(4, generator=generator),
            ]
            assert all(torch.equal(a[run], b) for a, b in zip(ours, theirs, strict=True))


def test_samples_of_a_policy_are_drawn_run_by_run() -> None:
    mean, log_std = torch.randn(3, 6, 2, 2), torch.randn(3, 6, 2, 2)
    together = TanhGaussian(mean, log_std).sample(4, Noise((5, 6, 7)).at(9))
    assert together.shape == (3, 4, 6, 2, 2)
    for run, seed in enumerate((5, 6, 7)):
        one = slice(run, run + 1)
        alone = TanhGaussian(mean[one], log_std[one]).sample(4, Noise((seed,)).at(9))
        assert torch.equal(together[one], alone)
