"""Values of many candidates against those of each candidate alone."""

from __future__ import annotations

import pytest
import torch

from omcda_deploy.training import candidates
from omcda_deploy.training.candidates import candidate_values
from omcda_deploy.training.fleet import stack
from omcda_deploy.training.networks import ContinuousQ

AGENTS = 3


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_many_candidates_are_valued_as_one_by_one(
    gradient: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_CHUNK", chunk)
    torch.manual_seed(0)
    q = stack([ContinuousQ(5, 2, AGENTS, 16) for _ in range(2)])
    observation = torch.randn(2, 7, AGENTS, 5, requires_grad=True)
    actions = torch.randn(2, 4, 7, AGENTS, 2, requires_grad=True)
    with torch.set_grad_enabled(gradient):
        together = candidate_values(q, observation, actions)
        apart = torch.stack([q(observation, action) for action in actions.unbind(1)], 1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.candidates(observation, actions), apart, rtol=1e-5, atol=1e-6)
    assert together.requires_grad == gradient
    if gradient:
        inputs = (*q.parameters(), observation, actions)
        ours, theirs = (torch.autograd.grad(values.square().sum(), inputs) for values in (together, apart))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_runs_candidate_values_do_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    critics = [ContinuousQ(5, 2, AGENTS, 16) for _ in range(3)]
    observation, actions = torch.randn(3, 7, AGENTS, 5), torch.randn(3, 4, 7, AGENTS, 2)
    results = []
    for runs in (slice(0, 1), slice(0, 3)):
        q = stack(critics[runs])
        values = candidate_values(q, observation[runs], actions[runs])
        results.append([values, *torch.autograd.grad(values.square().sum(), list(q.parameters()))])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone[0], together[0])
