"""Each ablation, allocation and mixer changes what it should and nothing else, to the last bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError
from omcda_deploy.training.algorithms import omcda, omiga
from omcda_deploy.training.allocation import (
    MIN_SHARE,
    STRATEGIES,
    Allocation,
    influence_shares,
    random_shares,
)
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.critics import DecoupledCritic, EntangledCritic
from omcda_deploy.training.distributions import policy_of
from omcda_deploy.training.networks import DivergenceMixer
from omcda_deploy.training.prices import Dual
from tests.support.synthetic import PAPER, continuous_spec, differing, make_learner, random_batch

SPEC = continuous_spec()
Array = NDArray[np.float64]
# Six tenths of the steps are warm-up, after which the dual runs whatever the critic does.
STEPS, WARM = 50, 30
SETTINGS: dict[str, Any] = {
    **PAPER,
    "settled": 0.0,
    "warmup": WARM / STEPS,
    "reallocate_every": 5,
    "alpha0": 0.3,
    "lr": 3e-3,
    "tau": 0.5,
    "tau_policy": 0.5,
    "lr_alpha": 0.05,
}


ON = torch.tensor([True])  # the dual of the only run


def learner(**changes: Any) -> omcda.Algorithm:
    algorithm = make_learner("omcda", SPEC, {**SETTINGS, **changes}, steps=STEPS)
    assert isinstance(algorithm, omcda.Algorithm)
    return algorithm


def batches(count: int = STEPS) -> list[Batch]:
    return [random_batch(SPEC, seed=seed) for seed in range(count)]


def run(algorithm: omcda.Algorithm) -> list[dict[str, torch.Tensor]]:
    return [algorithm.update(batch) for batch in batches()]


@pytest.mark.parametrize(
    ("allocation", "budget_differs"), [("uniform", set()), ("optimal", set()), ("random", {"budget"})]
)
def test_an_allocation_leaves_the_first_step_as_it_is(allocation: str, budget_differs: set[str]) -> None:
    """Shares by influence start uniform, and nothing depends on them before the dual begins."""
    ours, other = learner(), learner(allocation=allocation)
    batch = random_batch(SPEC)
    mine, theirs = ours.update(batch), other.update(batch)
    if allocation != "uniform":  # one price times the sum is the sum of products, but for rounding
        torch.testing.assert_close(theirs.pop("loss/dual"), mine.pop("loss/dual"))
    assert differing(mine, theirs) == budget_differs
    shares = {"allocation/shares"} if budget_differs else set()
    prices = ("log_alpha", "optimizer/state/0/exp_avg", "optimizer/state/0/exp_avg_sq")  # one for all agents
    one_price = {f"dual/{name}" for name in prices} if allocation == "optimal" else set()
    assert differing(ours.state_dict(0), other.state_dict(0)) == shares | one_price


@functools.cache
def history(allocation: str) -> list[dict[str, torch.Tensor]]:
    return run(learner(allocation=allocation))


@pytest.mark.parametrize("allocation", ["uniform", "random", "optimal"])
def test_an_allocation_changes_budgets_then_prices_then_the_rest(allocation: str) -> None:
    ours, theirs = history("influence"), history(allocation)
    pairs = [differing(a, b) for a, b in zip(ours, theirs, strict=True)]
    # While the price stands still, a budget touches nothing else but the loss that the dual does not descend yet.
    assert set().union(*pairs[:WARM]) == {"budget", "loss/dual"}
    # The step that starts the dual: only the dual sees the budgets.
    assert pairs[WARM] <= {"budget", "alpha", "loss/dual"}
    # From then on prices differ, and through them all that z weighs.
    assert {"alpha", "loss/policy", "loss/reward_value", "kl"} <= pairs[-1]
    assert [step["dual_active"].item() for step in ours] == [0.0] * WARM + [1.0] * (STEPS - WARM)


def test_shares_move_by_influence_and_by_what_one_price_spends() -> None:
    for allocation, strategy in STRATEGIES.items():
        budgets = torch.cat([step["budget"] for step in history(allocation)])
        moved = not torch.equal(budgets[0], budgets[-1])
        assert moved == (strategy.follows_influence or strategy.single_price), allocation
        assert moved == (allocation in ("influence", "optimal")), allocation
        torch.testing.assert_close(budgets.sum(-1), torch.full((STEPS,), omcda.Config().d_tot))


def test_without_decoupling_the_first_step_differs_in_critics_z_and_influence_only() -> None:
    ours, other = learner(), learner(decoupled=False)
    batch = random_batch(SPEC)
    expected = {
        # divergence has no critic of its own…
        "loss/divergence_critic",
        "loss/divergence_value",
        "value/divergence_total",
        "value/kappa_capped",
        # …the value is fitted to normalise z, not to regress on Q…
        "loss/reward_value",
        # …and what z weighs follows z
        "z/mean_exp",
        "loss/policy",
        "kl",
        "loss/dual",
        "influence",
        "influence_with_divergence",
    }
    mine, theirs = ours.update(batch), other.update(batch)
    assert differing(mine, theirs) == expected
    assert torch.equal(mine["loss/reward_critic"], theirs["loss/reward_critic"])
    # V_tot is all there is; the average of one measurement is that measurement but for its own rounding.
    weight = 1.0 - other.allocation._decay
    assert torch.equal(theirs["influence"], weight * theirs["influence_with_divergence"] / weight)


def test_without_decoupling_the_policy_loss_differs_through_z_alone() -> None:
    """Networks start equal, and each variant's policy loss is its own z in the one formula."""
    ours, other = learner(), learner(decoupled=False)
    assert differing(ours.actor.state_dict(), other.actor.state_dict()) == set()
    decoupled, entangled = ours.critic, other.critic
    assert isinstance(decoupled, DecoupledCritic)
    assert isinstance(entangled, EntangledCritic)
    for ours_net, other_net in (
        (decoupled.q_r, entangled.q),
        (decoupled.v_r, entangled.v),
        (decoupled.mixer_r, entangled.mixer),
    ):
        assert differing(ours_net.state_dict(), other_net.state_dict()) == set()
    batch = random_batch(SPEC)
    with torch.no_grad():
        w = entangled.mixer(batch.state)[0]
        z = w / 0.3 * (entangled.q(batch.observation, batch.action) - entangled.v(batch.observation))
        log_prob = policy_of(other.actor, batch.observation, None).log_prob(batch.action)
        expected = -(torch.exp(z) * log_prob).mean().unsqueeze(0)
    torch.testing.assert_close(other.update(batch)["loss/policy"], expected)


def test_without_decoupling_the_critic_is_omigas() -> None:
    """L_V of OMIGA carries a factor exp(-M); its Q loss is the same number."""
    entangled = learner(decoupled=False, alpha0=0.1)
    single = make_learner("omiga", SPEC, {"alpha": 0.1})
    assert isinstance(single, omiga.Algorithm)
    batch = random_batch(SPEC)
    with torch.no_grad():
        w, _ = single.mixer(batch.state)
        z = w / 0.1 * (single.q(batch.observation, batch.action) - single.v(batch.observation))
    ours, theirs = entangled.update(batch), single.update(batch)
    assert torch.equal(ours["loss/reward_critic"], theirs["loss/critic"])
    assert float(z.max()) > 0.1
    torch.testing.assert_close(ours["loss/reward_value"], theirs["loss/value"] * torch.exp(z.max()))


def test_the_divergence_mixer_leaves_the_reward_critic_as_it_is() -> None:
    learned, identity = learner(divergence_mixer="learned"), learner(divergence_mixer="identity")
    batch = random_batch(SPEC)
    different = differing(learned.update(batch), identity.update(batch))
    assert different == {
        "loss/divergence_critic",
        "loss/divergence_value",
        "value/divergence_total",
        "z/mean_exp",
        "loss/policy",
        "loss/reward_value",
        "kl",
        "loss/dual",
        "influence",
        "influence_with_divergence",
    }


@pytest.mark.parametrize("mixer", ["learned", "identity"])
def test_losses_of_the_decoupled_critic_by_loops(mixer: str) -> None:
    """Section 3 of the derivation in float64, agent by agent: the transposed mixer product does not pass."""
    alpha = torch.tensor([[[0.2, 0.05, 0.4]]])
    algorithm = learner(divergence_mixer=mixer, z_max=0.3, kappa_max=3.0)
    critic = algorithm.critic
    assert isinstance(critic, DecoupledCritic)
    # Targets that differ from the online networks show which of the two is used where.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (*critic.online.parameters(), *critic.target.parameters()):
            parameter.mul_(1.5 + 0.5 * torch.randn(parameter.shape, generator=generator))
    batch = random_batch(SPEC, size=16)
    step = critic.terms(batch, alpha, algorithm.budgets)
    losses, rho, capped, above = decoupled_losses(critic, batch, alpha[0, 0].double().numpy(), 0.3, 3.0)
    assert 0.1 < above < 0.9, "neither side of z_max is common, so one goes untested"
    assert (0.1 < capped < 0.9) or mixer == "identity", "the cap on kappa goes untested"
    np.testing.assert_allclose(step.rho[0].numpy(), rho, rtol=2e-5)
    for name, expected in losses.items():
        np.testing.assert_allclose(step.losses[name].item(), expected, rtol=2e-5, err_msg=name)


def decoupled_losses(
    critic: DecoupledCritic, batch: Batch, alpha: Array, z_max: float, kappa_max: float
) -> tuple[dict[str, float], Array, float, float]:
    """Losses, rho [B, N], and the shares of capped kappa and of z above z_max."""
    o, a, s, o2, s2 = batch.observation, batch.action, batch.state, batch.next_observation, batch.next_state

    def numbers(*tensors: torch.Tensor) -> list[Array]:
        return [tensor[0].detach().double().numpy() for tensor in tensors]  # of the only run

    r, m = numbers(batch.reward, batch.not_done)
    q_r, v_r, q_c, v_c = numbers(critic.q_r(o, a), critic.v_r(o), critic.q_c(o, a), critic.v_c(o))
    q_rt, q_ct = numbers(critic.q_r_target(o, a), critic.q_c_target(o, a))
    v_r2, v_c2 = numbers(critic.v_r_target(o2), critic.v_c_target(o2))
    (w_r, b_r), (w_c, b_c) = numbers(*critic.mixer_r(s)), numbers(*critic.mixer_c(s))
    w_rt, _ = numbers(*critic.mixer_r_target(s))
    w_ct, _ = numbers(*critic.mixer_c_target(s))
    (w_r2, b_r2), (w_c2, b_c2) = (
        numbers(*critic.mixer_r_target(s2)),
        numbers(*critic.mixer_c_target(s2)),
    )
    size, agents = v_r.shape
    sums = dict.fromkeys(("reward_critic", "divergence_critic", "reward_value", "divergence_value"), 0.0)
    rho, capped, above = np.zeros((size, agents)), 0, 0
    for x in range(size):
        y = r[x] + 0.99 * m[x] * (sum(w_r2[x, i] * v_r2[x, i] for i in range(agents)) + b_r2[x])
        total = sum(w_r[x, i] * q_r[x, i] for i in range(agents)) + b_r[x]
        sums["reward_critic"] += (total - y) ** 2 / size
        for k in range(agents):
            y_k = 0.99 * m[x] * (sum(w_c2[x, k, j] * v_c2[x, j] for j in range(agents)) + b_c2[x, k])
            total_k = sum(w_c[x, k, j] * q_c[x, j] for j in range(agents)) + b_c[x, k]
            sums["divergence_critic"] += (total_k - y_k) ** 2 / (size * agents)
        for i in range(agents):
            free = sum(alpha[k] * w_ct[x, k, i] for k in range(agents)) / alpha[i]
            kappa = min(free, kappa_max)
            z = w_rt[x, i] / alpha[i] * (q_rt[x, i] - v_r[x, i]) + kappa * (q_ct[x, i] - v_c[x, i])
            rho[x, i] = np.exp(min(z, z_max))
            continued = np.exp(z) if z < z_max else np.exp(z_max) * (1.0 + z - z_max)
            sums["reward_value"] += rho[x, i] * (q_rt[x, i] - v_r[x, i]) ** 2 / (size * agents)
            sums["divergence_value"] += (continued / kappa + v_c[x, i]) / (size * agents)
            capped += free > kappa_max
            above += z > z_max
    return sums, rho, capped / (size * agents), above / (size * agents)


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_losses_of_values_that_begin_at_the_data(decoupled: bool) -> None:
    """Q is regressed on r + gamma m U(s'), U on returns-to-go, until the warm-up ends; then no more."""
    algorithm = learner(decoupled=decoupled, value_start="data", warmup=0.5)
    batch = random_batch(SPEC, size=16)
    critic, recorded = algorithm.critic, algorithm.critic.recorded
    assert recorded is not None
    mixer, q = (
        (critic.mixer_r, critic.q_r) if isinstance(critic, DecoupledCritic) else (critic.mixer, critic.q)
    )
    u, following = (
        recorded.network(state)[0].detach().double().numpy() for state in (batch.state, batch.next_state)
    )
    weights, bias = (part[0].detach().double().numpy() for part in mixer(batch.state))
    values = q(batch.observation, batch.action)[0].detach().double().numpy()
    largest = 50.0  # of the batch's range
    y = batch.reward[0].numpy() + 0.99 * batch.not_done[0].numpy() * largest * following
    expected = {
        "reward_critic": np.square((weights * values).sum(-1) + bias - y).mean(),
        "recorded_value": np.square(u - batch.return_to_go[0].numpy() / largest).mean(),
    }
    metrics = algorithm.update(batch)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"].item(), value, rtol=2e-5, err_msg=name)
    for _ in range(STEPS // 2):
        metrics = algorithm.update(batch)
    assert "loss/recorded_value" not in metrics


def test_each_loss_moves_only_what_it_is_for() -> None:
    """The sum of all losses is descended at once, which is right only while they share no parameter."""
    algorithm = learner(value_start="data")
    critic = algorithm.critic
    assert isinstance(critic, DecoupledCritic)
    assert critic.recorded is not None
    losses = critic.terms(
        random_batch(SPEC), algorithm.alpha.unsqueeze(1), algorithm.budgets, begins=True
    ).losses
    names = ("q_r", "v_r", "mixer_r", "q_c", "v_c", "mixer_c")
    moved: dict[str, set[str]] = {
        "recorded_value": set(),
        "reward_critic": {"q_r", "mixer_r"},
        "divergence_critic": {"q_c", "mixer_c"},
        "reward_value": {"v_r"},
        "divergence_value": {"v_c"},
    }
    for loss, expected in moved.items():
        critic.online.zero_grad(set_to_none=True)
        losses[loss].backward(retain_graph=True)  # type: ignore[no-untyped-call]
        touched = {
            name for name in names if any(p.grad is not None for p in getattr(critic, name).parameters())
        }
        assert touched == expected, loss
        begun = any(p.grad is not None for p in critic.recorded.network.parameters())
        assert begun == (loss == "recorded_value")
        critic.recorded.network.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in critic.target.parameters())


def test_kappa_sums_over_constraints_of_the_column() -> None:
    algorithm = learner()
    assert isinstance(algorithm.critic, DecoupledCritic)
    w_c = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 1.0, 5.0], [6.0, 7.0, 1.0]]]])  # [R, B, k, i]
    kappa = algorithm.critic.kappa(w_c, torch.tensor([[[1.0, 10.0, 100.0]]]))
    torch.testing.assert_close(
        kappa, torch.tensor([[[1 + 40 + 600, (2 + 10 + 700) / 10, (3 + 50 + 100) / 100]]])
    )


def test_a_learned_mixer_keeps_its_diagonal_and_is_nonnegative() -> None:
    mixer = DivergenceMixer(4, 3, 8)
    weights, bias = mixer(3.0 * torch.randn(50, 4))
    assert torch.equal(torch.diagonal(weights, dim1=1, dim2=2), torch.ones(50, 3))
    assert bool((weights >= 0.0).all())
    assert bias.shape == (50, 3)


def test_one_price_follows_the_total_alone() -> None:
    dual = Dual(3, torch.tensor([[1.0]]), lr=0.01, single_price=[True])
    # Over in sum, under in two of three.
    dual.descend(torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([[0.5, 0.0, 0.0]]), ON)
    assert dual.alpha[0].tolist() == [dual.alpha[0, 0].item()] * 3
    assert dual.alpha[0, 0] > 1.0
    other = Dual(3, torch.tensor([[1.0]]), lr=0.01, single_price=[True])
    # Another split of the same sums.
    other.descend(torch.tensor([[0.3, 0.0, 0.0]]), torch.tensor([[0.0, 0.2, 0.3]]), ON)
    assert torch.equal(dual.alpha, other.alpha)


def test_a_divergence_above_its_budget_raises_the_price() -> None:
    dual = Dual(3, torch.tensor([[1.0]]), lr=0.01, single_price=[False])
    loss = dual.descend(torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([[0.3, 0.1, 0.0]]), ON)
    [[up, same, down]] = dual.alpha.tolist()
    assert up > 1.0
    assert same == 1.0
    assert down < 1.0
    torch.testing.assert_close(loss, torch.tensor([-0.2 + 0.0 + 0.1]))


def test_prices_stay_within_their_bounds_and_say_when_they_sit_on_one() -> None:
    dual = Dual(2, torch.tensor([[2.0]]), lr=0.5, single_price=[False])
    assert dual.at_bound.tolist() == [[False, False]]
    for _ in range(50):
        dual.descend(torch.tensor([[0.0, 10.0]]), torch.tensor([[1.0, 0.0]]), ON)
    np.testing.assert_allclose(dual.alpha.numpy(), [[5.0 * 2.0, 2.0 / 200.0]], rtol=1e-5)
    assert dual.at_bound.tolist() == [[True, True]]


def test_the_dual_waits_for_the_reward_critic_or_the_end_of_the_warm_up() -> None:
    initial = torch.full((1, 3), 0.3)
    for index, step in enumerate(history("influence")):  # never settled: a share of the planned steps
        moved = not torch.allclose(step["alpha"], initial, rtol=1e-6)
        assert moved == bool(step["dual_active"]) == (index >= WARM)
    settled = learner(settled=1e9, warmup=1.0)
    metrics = settled.update(random_batch(SPEC))
    assert bool(metrics["dual_active"])  # at once
    assert not torch.allclose(metrics["alpha"], initial, rtol=1e-6)


def test_a_waiting_dual_keeps_its_moments_at_rest() -> None:
    """Its loss is reported, but leaves no trace in the first step that it takes."""
    first, later = (Dual(3, torch.tensor([[1.0]]), lr=0.01, single_price=[False]) for _ in range(2))
    budgets, divergence = torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([[0.3, 0.1, 0.0]])
    before = first.state_dict(0)
    for _ in range(5):
        later.descend(budgets, 2.0 * divergence, ~ON)
    assert differing(before, later.state_dict(0)) == set()
    for dual in (first, later):
        dual.descend(budgets, divergence, ON)
    assert differing(first.state_dict(0), later.state_dict(0)) == set()
    assert differing(first.state_dict(0), before)


def test_a_dual_once_started_stays_on_after_resuming() -> None:
    algorithm, resumed = (learner(settled=0.0, warmup=1.0) for _ in range(2))
    batch = random_batch(SPEC)
    assert not bool(algorithm.update(batch)["dual_active"])
    waiting = algorithm.alpha.clone()
    algorithm.settling.active.fill_(True)  # as a critic that was settled for a while leaves it
    resumed.load_state_dicts([algorithm.state_dict(0)])
    assert bool(resumed.update(batch)["dual_active"])
    assert not torch.equal(resumed.alpha, waiting)


@pytest.mark.parametrize("agents", [2, 3, 8])
def test_shares_sum_to_one_above_a_floor(agents: int) -> None:
    extreme = torch.linspace(-50.0, 50.0, agents)
    least = MIN_SHARE / (1.0 + agents * MIN_SHARE)  # the least share holds before renormalising
    for shares in (influence_shares(extreme, 1.0), *(random_shares(agents, seed) for seed in range(20))):
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
        assert float(shares.min()) >= least - 1e-7
    assert influence_shares(extreme, 1.0).argmax() == agents - 1
    np.testing.assert_allclose(influence_shares(extreme, 1e9).numpy(), 1 / agents, rtol=1e-4)


def test_random_shares_are_one_draw_per_seed() -> None:
    assert torch.equal(random_shares(4, 7), random_shares(4, 7))
    draws = {tuple(random_shares(4, seed).tolist()) for seed in range(10)}
    assert len(draws) == 10


def influence_allocation() -> Allocation:
    """The allocation of one run by influence, with a total of 1 nat."""
    one = torch.tensor([[1.0]])
    return Allocation(["influence"], 3, one, [0], temperature=one, decay=0.5)


def test_shares_wait_for_a_divergence_and_then_follow_the_influence() -> None:
    allocation = influence_allocation()
    measured = torch.tensor([[6.0, 1.0, -1.0]])
    allocation.observe(measured, torch.tensor([[0.003, 0.003, 0.003]]))  # 0.9 % of the total
    np.testing.assert_allclose(allocation.budgets.numpy(), np.full((1, 3), 1 / 3), rtol=1e-6)
    allocation.observe(measured, torch.tensor([[0.004, 0.004, 0.004]]))
    # m / mean |m| = (6, 1, -1) * 3 / 8, whatever the reward's scale is
    raw = np.exp(np.array([6.0, 1.0, -1.0]) * 3 / 8)
    floored = np.maximum(raw / raw.sum(), MIN_SHARE)
    np.testing.assert_allclose(allocation.shares[0].numpy(), floored / floored.sum(), rtol=1e-5)
    np.testing.assert_allclose(allocation.mean_influence.numpy(), measured.numpy(), rtol=1e-6)
    scaled = influence_allocation()
    scaled.observe(1000.0 * measured, torch.ones(1, 3))
    np.testing.assert_allclose(scaled.shares.numpy(), allocation.shares.numpy(), rtol=1e-5)
    allocation.observe(measured.flip(1), torch.zeros(1, 3))  # once begun, that goes on at any divergence
    assert allocation.shares[0, 0] < scaled.shares[0, 0]


def test_shares_under_one_price_are_an_average_of_what_agents_spend() -> None:
    one = torch.tensor([[1.0]])
    allocation = Allocation(["optimal"], 3, one, [0], temperature=one, decay=0.5)
    spent = torch.tensor([[0.6, 0.3, 0.1]])
    allocation.observe(torch.tensor([[5.0, -1.0, 0.0]]), 0.009 * spent)  # 0.9 % of the total: too little
    np.testing.assert_allclose(allocation.budgets.numpy(), np.full((1, 3), 1 / 3), rtol=1e-6)
    allocation.observe(torch.zeros(1, 3), spent)
    np.testing.assert_allclose(allocation.budgets[0].numpy(), 0.5 / 3 + 0.5 * spent[0].numpy(), rtol=1e-6)
    for _ in range(40):
        allocation.observe(torch.zeros(1, 3), 7.0 * torch.tensor([[0.9, 0.1, 0.0]]))
    floored = np.maximum([0.9, 0.1, 0.0], MIN_SHARE)
    # The floor is renormalised every time, so the others' rest is a little below their part.
    np.testing.assert_allclose(allocation.shares[0].numpy(), floored / floored.sum(), atol=0.01)


def test_unknown_choices_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"allocation: expected one of optimal, influence, uniform, random"):
        dataclasses.replace(omcda.Config(), allocation="fair")
    with pytest.raises(ConfigError, match=r"divergence_mixer: expected one of learned, identity, got 'free'"):
        omcda.Config(divergence_mixer="free")
