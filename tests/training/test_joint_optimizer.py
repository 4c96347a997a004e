"""The optimiser of a fleet is torch's Adam, with gradients clipped, for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.fleet import stack
from omcda_deploy.training.mlp import AgentMLP
from omcda_deploy.training.optimizer import Group, JointOptimizer, parameters_of
from tests.support.synthetic import differing

CLIP = 0.05
RATES = (0.02, 0.005)


def two_networks(runs: int) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(2)
    return [(AgentMLP(3, 2, 2, 7), AgentMLP(4, 1, 2, 5)) for _ in range(runs)]


def loss_of(networks: Sequence[nn.Module], inputs: Sequence[Tensor], scale: float | Tensor) -> Tensor:
    """A loss per leading axis, or one; large enough to be clipped now and then."""
    first, second = (network(x) for network, x in zip(networks, inputs, strict=True))
    size = 1 if first.ndim == 3 else len(first)
    total: Tensor = (first.square().view(size, -1).mean(1) + second.sin().view(size, -1).mean(1)) * scale
    return total


def test_the_optimiser_is_adam_with_clipping_for_each_run() -> None:
    runs = two_networks(3)
    together = [stack([pair[i] for pair in runs]) for i in range(2)]
    groups = [Group(parameters_of(network), lr) for network, lr in zip(together, RATES, strict=True)]
    ours = JointOptimizer(groups, CLIP, modules={"first": together[0], "second": together[1]})
    adams = [adam_of(pair) for pair in runs]
    scales = torch.tensor([0.01, 1.0, 100.0])  # the first run is hardly ever clipped, the last always
    clipped = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        inputs = [torch.randn(3, 8, 2, i, generator=generator) for i in (3, 4)]
        ours.descend({"loss": loss_of(together, inputs, scales)})
        for run, (pair, adam) in enumerate(zip(runs, adams, strict=True)):
            norms = step_of(adam, loss_of(pair, [x[run] for x in inputs], scales[run].item()))
            clipped |= {(run, norm > CLIP) for norm in norms}
    assert clipped >= {(0, False), (2, True)}
    for run, (pair, adam) in enumerate(zip(runs, adams, strict=True)):
        state = ours.state_dict(run)
        for name, network in zip(("first", "second"), pair, strict=True):
            torch.testing.assert_close(state[name], dict(network.state_dict()), rtol=1e-4, atol=1e-6)
        theirs = adam.state_dict()
        assert state["learner"].keys() == theirs.keys()
        assert [group["params"] for group in state["learner"]["param_groups"]] == [
            group["params"] for group in theirs["param_groups"]
        ]
        assert [group["lr"] for group in state["learner"]["param_groups"]] == list(RATES)
        torch.testing.assert_close(state["learner"]["state"], theirs["state"], rtol=1e-3, atol=1e-7)


def adam_of(pair: Sequence[nn.Module]) -> torch.optim.Adam:
    groups = [{"params": list(n.parameters()), "lr": lr} for n, lr in zip(pair, RATES, strict=True)]
    return torch.optim.Adam(groups)


def step_of(adam: torch.optim.Adam, loss: Tensor) -> list[float]:
    """Take a step as before fleets; return the gradient norms."""
    adam.zero_grad()
    loss.sum().backward()  # type: ignore[no-untyped-call]
    norms = [float(nn.utils.clip_grad_norm_(group["params"], CLIP)) for group in adam.param_groups]
    adam.step()
    return norms


def test_a_checkpoint_of_torchs_adam_is_taken_up(tmp_path: Path) -> None:
    """As one written before fleets: tensors of one run's own shapes, and all options of its Adam."""
    runs = two_networks(2)
    adams = [adam_of(pair) for pair in runs]
    inputs = [torch.randn(2, 8, 2, i) for i in (3, 4)]
    for run, (pair, adam) in enumerate(zip(runs, adams, strict=True)):
        for _ in range(5):
            step_of(adam, loss_of(pair, [x[run] for x in inputs], 1.0))
        modules = {
            name: network.state_dict() for name, network in zip(("first", "second"), pair, strict=True)
        }
        save_state(tmp_path / f"{run}.pt", {**modules, "learner": adam.state_dict(), "step": 5})

    together = [stack([AgentMLP(3, 2, 2, 7)] * 2), stack([AgentMLP(4, 1, 2, 5)] * 2)]
    groups = [Group(parameters_of(network), lr) for network, lr in zip(together, RATES, strict=True)]
    ours = JointOptimizer(groups, CLIP, modules={"first": together[0], "second": together[1]})
    ours.load_state_dicts([load_state(tmp_path / f"{run}.pt") for run in range(2)])
    for run in range(2):
        written, read = load_state(tmp_path / f"{run}.pt"), ours.state_dict(run)
        assert differing(read["learner"]["state"], written["learner"]["state"]) == set()
        assert differing(read["first"], written["first"]) == set()
    for _ in range(5):
        ours.descend({"loss": loss_of(together, inputs, 1.0)})
    for run, (pair, adam) in enumerate(zip(runs, adams, strict=True)):
        for _ in range(5):
            step_of(adam, loss_of(pair, [x[run] for x in inputs], 1.0))
        torch.testing.assert_close(
            ours.state_dict(run)["learner"]["state"], adam.state_dict()["state"], rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(
            ours.state_dict(run)["second"], dict(pair[1].state_dict()), rtol=1e-5, atol=1e-6
        )
