"""BCQ: batch-constrained Q-learning for teams (Fujimoto et al., ICML 2019, 1812.02900).

Every agent maximises its own Q_i, but only over actions that the data make likely; a monotone mixer makes the
agents' own maxima the team's. Bars: target networks, no gradient; m = 1 - terminal; e_i in every network's input.

Continuous: likely actions are those of a conditional VAE, moved a little by a perturbation xi,

    L_vae = mean[(D(o,z) - a)^2] + (1/2) KL(E(z|o,a) || N(0, 1)),     both means over entries
    a^k   = clip(D(o,z^k) + phi tanh xi(o, D(o,z^k)), -1, 1),         z^k ~ N(0, 1) clamped to [-0.5, 0.5]
    q*_i  = max_k [ 0.75 min(Qbar1_i, Qbar2_i) + 0.25 max(Qbar1_i, Qbar2_i) ](o'_i, abar^k_i)      (k = 1..10)
    y     = r + gamma m Qbar_tot(s'; q*),         L_Q = (Q1_tot - y)^2 + (Q2_tot - y)^2
    L_xi  = -Q1_i(o_i, a_i),                      gradient through xi alone.

The policy is the best of 100 candidates by Q1. Its candidates come from latents drawn once from a fixed seed and
kept in the policy (the same for every agent, state and run), so it is a deterministic function of the observation:
what is evaluated, exported and served is one graph. It is exported as a tanh-Gaussian without width.

Discrete: likely actions are those with ``G(a|o) / max_a' G(a'|o) >= threshold`` under the cloned behaviour G,

    a*_i = argmax over likely available a of Q_i(o'_i, a),
    L_Q  = (Q_tot(s, a) - [r + gamma m Qbar_tot(s', a*)])^2,         policy: the same argmax at o.

G is the dataset's behaviour model, which every run has; a second classifier would estimate the same.

Deviations from published code: the VAE decodes sampled latents with the inputs in the order it was trained on (the
released one swaps z and e_i); the latent has 2 A entries as in BCQ, not 2 N (``latent=team``); the discrete policy
keeps its restriction when it acts (OG-MARL drops it); discrete targets follow softly, as all others here, and the
factor 1/2 of that loss is left out. All mixers fit: only Q_tot of each agent's own choice is needed.

Source: docs/baselines.md#bcq.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch, noise_at
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import TIE, AgentMLP, GreedyActor, NetworkFactory, total_value
from omcda_deploy.training.optimizer import Group, JointOptimizer, frozen, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    Choice,
    Count,
    GradientNorm,
    LearningRate,
    Range,
    SampleCount,
    Tau,
    Unit,
    Weight,
    Width,
    check,
)

PAPER = "Off-Policy Deep Reinforcement Learning without Exploration (2019), with OMIGA's networks"
SUMMARY = "maximises Q over actions that the data make likely"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "neg_log_behavior", "discrete": "neg_log_behavior"}
COLUMNS = (KL,)

LATENT_LIMIT = 0.5  # beyond it the decoder gives actions that the data hardly hold
LATENT_SEED = 0
ENCODER_LOG_STD = (-4.0, 15.0)
NO_WIDTH = -20.0  # log std of the exported policy: noise of any likely size moves an action by less than 1e-7
# atanh of an action nearer to +-1 is mostly rounding in float32, and no two runtimes would agree on it.
DEPLOYED_LIMIT = 0.999


@dataclass(frozen=True)
class Config:
    """Settings of BCQ as published for MA-MuJoCo (continuous) and SMAC (discrete)."""

    threshold: Unit = 0.4  # discrete: least G/max G of an allowed action; 0 allows all
    phi: Annotated[float, Range(0.0, 2.0)] = 0.05  # continuous: largest move of an action by the perturbation
    # Continuous: actions per agent over which a target is maximised.
    target_samples: Annotated[int, Range(1, 1024)] = 10
    candidates: SampleCount = 100  # continuous: actions per agent that the policy chooses among
    pessimism: Unit = 0.75  # continuous: weight of the smaller of the two Qbar; the larger has the rest
    # Continuous, the size of z: 2 A, or 2 N as in the published team code.
    latent: Annotated[str, Choice("action", "team")] = "action"
    kl_weight: Weight = 0.5
    vae_hidden: Width = 64
    mixer: Annotated[str, Choice("linear", "vdn", "qmix")] = "linear"
    lr: LearningRate = 5e-4
    gamma: Unit = 0.99
    tau: Tau = 0.005
    grad_clip: GradientNorm = 1.0  # norm, per group of parameters
    batch_size: Count = 128
    hidden: Width = 256
    mixer_hidden: Width = 64

    def __post_init__(self) -> None:
        check(self)


class GenerativeActor(nn.Module):
    """Choose by ``q`` among perturbed samples of the decoder, whose latents never change."""

    latents: Tensor  # [candidates, L]

    def __init__(self, config: Config, networks: NetworkFactory) -> None:
        super().__init__()
        spec = networks.spec
        o, a, n = spec.observation_size, spec.action_size, len(spec.agents)
        self.action, self.latent = a, 2 * (a if config.latent == "action" else n)
        self.phi = config.phi
        self.decoder = AgentMLP(o + self.latent, a, n, config.vae_hidden)
        self.perturbation = AgentMLP(o + a, a, n, networks.hidden)
        self.q: Any = networks.q()
        generator = torch.Generator().manual_seed(LATENT_SEED)
        latents = torch.randn((config.candidates, self.latent), generator=generator)
        self.register_buffer("latents", latents.clamp(-LATENT_LIMIT, LATENT_LIMIT))

    def decode(self, observation: Tensor, latents: Tensor, agent: int | None = None) -> Tensor:
        """Decode ``[B, (N,) O]``, latents [K, B, (N,) L] or broadcastable -> actions [K, B, (N,) A]."""
        return torch.tanh(self.decoder.branch(observation, latents, self.latent, agent))

    def perturb(self, xi: Any, observation: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Return ``clip(a + phi tanh xi(o, a), -1, 1)``: ``[B, (N,) O], [K, B, (N,) A] -> [K, B, (N,) A]``."""
        move = torch.tanh(xi.branch(observation, action, self.action, agent))
        return (action + self.phi * move).clamp(-1.0, 1.0)

    def candidates(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Make candidates: ``[B, (N,) O] -> (actions [K, B, (N,) A], their values [K, B, (N)])``."""
        latents = self.latents[:, None, None] if agent is None else self.latents[:, None]
        decoded = self.decode(observation, latents, agent)
        actions = self.perturb(self.perturbation, observation, decoded, agent)
        return actions.clamp(-DEPLOYED_LIMIT, DEPLOYED_LIMIT), self.q.candidates(observation, actions, agent)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[B, (N,) O] -> (atanh of the action [B, (N,) A], log_std [B, (N,) A] of no width)``."""
        actions, values = self.candidates(observation, agent)
        best = values.argmax(0)[None, ..., None]  # [1, B, (N,) 1]
        action = actions.gather(0, best.expand(*[-1] * observation.dim(), self.action)).squeeze(0)
        mean = 0.5 * (torch.log(1.0 + action) - torch.log(1.0 - action))  # atanh, which ONNX opset 17 lacks
        return mean, torch.full_like(mean, NO_WIDTH)

    def as_good(self, observation: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Test if ``action`` [B, (N,) A] is a best candidate up to rounding, bool [B, (N)]."""
        actions, values = self.candidates(observation, agent)
        best = values.amax(0)
        near = values >= best - TIE * (1.0 + best.abs())
        as_good: Tensor = (near & ((actions - action).abs() <= TIE).all(-1)).any(0)
        return as_good


class RestrictedActor(nn.Module):
    """Take ``argmax q`` over the available actions that ``behavior`` makes likely, as a degenerate categorical."""

    def __init__(self, config: Config, networks: NetworkFactory) -> None:
        super().__init__()
        self.threshold = config.threshold
        q: Any = networks.q()
        self.greedy = GreedyActor(q)
        self.behavior: Any = networks.actor().requires_grad_(False)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, (N,) O]``, mask [B, (N,) A] -> log-probabilities, 0 at the choice, else the lowest float."""
        likely = allowed(self.behavior(observation, mask, agent), mask, self.threshold)
        log_probs: Tensor = self.greedy(observation, likely, agent)
        return log_probs

    def as_good(self, observation: Tensor, mask: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Test as :meth:`GreedyActor.as_good`; an action on the threshold up to rounding may be allowed or not."""
        log_g = self.behavior(observation, mask, agent)
        possible = allowed(log_g, mask, self.threshold, slack=-TIE)
        certain = allowed(log_g, mask, self.threshold, slack=TIE)
        among = certain | (F.one_hot(action, mask.shape[-1]).bool() & possible)
        as_good: Tensor = self.greedy.as_good(observation, among, action, agent)
        return as_good


def allowed(log_g: Tensor, mask: Tensor, threshold: float, slack: float = 0.0) -> Tensor:
    """Mark available a with ``G(a) >= threshold max G``: log G and mask [..., A] -> bool; ``slack`` is in nats."""
    least = min(math.log(threshold) + slack, 0.0) if threshold > 0.0 else -math.inf
    return (log_g - log_g.amax(-1, keepdim=True) >= least) & mask.bool()


def vae_loss(decoded: Tensor, action: Tensor, mean: Tensor, log_std: Tensor, kl_weight: float) -> Tensor:
    """Return L_vae: ``mean (a^ - a)^2 + kl_weight mean KL(N(mean, std) || N(0, 1))``, means over all entries."""
    kl = 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0) - log_std
    return (decoded - action).square().mean() + kl_weight * kl.mean()


def pessimistic_maximum(q1: Tensor, q2: Tensor, pessimism: float) -> Tensor:
    """Return ``max_k [p min(q1, q2) + (1 - p) max(q1, q2)]``: [K, B, N] -> [B, N]."""
    return (pessimism * torch.minimum(q1, q2) + (1.0 - pessimism) * torch.maximum(q1, q2)).amax(0)


class GenerativeLosses:
    """Losses of VAE, twin critics and perturbation, for continuous actions."""

    q1_target: Any
    q2_target: Any

    def __init__(self, config: Config, networks: NetworkFactory, policy: GenerativeActor) -> None:
        self._config, self._policy = config, policy
        spec = networks.spec
        sizes = (spec.observation_size + spec.action_size, 2 * policy.latent, len(spec.agents))
        self.encoder = AgentMLP(*sizes, config.vae_hidden)
        self.q2, self.mixer = networks.q(), networks.mixer(config.mixer_hidden, config.mixer)
        self.beside_policy = nn.ModuleList((self.encoder, self.q2, self.mixer)).to(policy.latents.device)
        self.online = nn.ModuleList((policy.q, self.q2, self.mixer, policy.perturbation))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q1_target, self.q2_target, self.mixer_target, self.perturbation_target = self.target

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        policy, lr = self._policy, self._config.lr
        return [
            Group(parameters_of(policy.perturbation), lr),
            Group(parameters_of(policy.q, self.q2, self.mixer), lr),
            Group(parameters_of(self.encoder, policy.decoder), lr),
        ]

    def __call__(self, batch: Batch, noise: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return losses and metrics."""
        c, policy = self._config, self._policy
        o, a = batch.observation, batch.action
        mean, log_std = self.encoder(torch.cat((o, a), -1)).chunk(2, -1)
        log_std = log_std.clamp(*ENCODER_LOG_STD)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=noise, device=mean.device)
        with torch.no_grad():
            y = self._bellman(batch, noise)
            decoded = policy.decode(o, self._latents(o, 1, noise))  # [1, B, N, A]
        q1, q2 = (total_value(self.mixer, q(o, a), batch.state) for q in (policy.q, self.q2))
        with frozen(policy.q):
            perturbed = policy.perturb(policy.perturbation, o, decoded)
            value = policy.q.candidates(o, perturbed)
        losses = {
            "policy": -value.mean(),  # L_xi
            "critic": (q1 - y).square().mean() + (q2 - y).square().mean(),  # L_Q
            "vae": vae_loss(policy.decode(o, z[None])[0], a, mean, log_std, c.kl_weight),  # L_vae
        }
        distance = (perturbed - decoded).abs().mean()
        return losses, {"value/reward_total": q1.detach().mean(), "perturbation": distance.detach()}

    def _bellman(self, batch: Batch, noise: torch.Generator) -> Tensor:
        c, o2 = self._config, batch.next_observation
        decoded = self._policy.decode(o2, self._latents(o2, c.target_samples, noise))
        actions = self._policy.perturb(self.perturbation_target, o2, decoded)
        q1, q2 = (q.candidates(o2, actions) for q in (self.q1_target, self.q2_target))
        best = pessimistic_maximum(q1, q2, c.pessimism)
        next_q_tot = total_value(self.mixer_target, best, batch.next_state)
        return batch.reward + c.gamma * batch.not_done * next_q_tot

    def _latents(self, observation: Tensor, count: int, noise: torch.Generator) -> Tensor:
        shape = (count, *observation.shape[:2], self._policy.latent)
        latents = torch.randn(shape, generator=noise, device=observation.device)
        return latents.clamp_(-LATENT_LIMIT, LATENT_LIMIT)


class RestrictedLosses:
    """The loss of one critic whose targets use the policy's own choice, for discrete actions."""

    def __init__(self, config: Config, networks: NetworkFactory, policy: RestrictedActor) -> None:
        self._config, self._policy = config, policy
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.beside_policy = nn.ModuleList((self.mixer,)).to(next(policy.behavior.parameters()).device)
        self.online = nn.ModuleList((policy.greedy.q, self.mixer))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        return [Group(parameters_of(self.online), self._config.lr)]

    def __call__(self, batch: Batch, noise: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return losses and metrics."""
        c, policy = self._config, self._policy
        assert batch.mask is not None  # the sampler gives every discrete batch its masks
        assert batch.next_mask is not None
        with torch.no_grad():
            choice = policy(batch.next_observation, batch.next_mask).argmax(-1)
            best = self.q_target(batch.next_observation, choice)
            next_q_tot = total_value(self.mixer_target, best, batch.next_state)
            y = batch.reward + c.gamma * batch.not_done * next_q_tot
            log_g = policy.behavior(batch.observation, batch.mask)
        scores = policy.greedy.q.values(batch.observation)
        data_values = scores.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        q = total_value(self.mixer, data_values, batch.state)
        with torch.no_grad():
            likely = allowed(log_g, batch.mask, c.threshold)
            policy_action = scores.masked_fill(~likely, -math.inf).argmax(-1, keepdim=True)
            metrics = {
                "value/reward_total": q.mean(),
                "kl": -log_g.gather(-1, policy_action).squeeze(-1).mean(0),
                "allowed": likely.sum(-1).float().mean(0),
            }
        return {"critic": (q - y).square().mean()}, metrics  # L_Q


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    kind = GenerativeActor if networks.spec.action_kind == "continuous" else RestrictedActor
    return kind(config, networks)


class Algorithm:
    """Train by BCQ: one :meth:`update` is one gradient step on a batch."""

    budgets = alpha = None

    def __init__(
        self,
        config: Config,
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """Use ``behavior``, the cloned pi_b, to allow discrete actions and to measure divergence."""
        self.config, self._seed, self._device = config, seed, device
        self.policy = make_policy(config, networks).to(device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self._losses: GenerativeLosses | RestrictedLosses
        if isinstance(self.policy, RestrictedActor):
            self.policy.behavior.load_state_dict(behavior.state_dict())
            self._losses = RestrictedLosses(config, networks, self.policy)
        else:
            assert isinstance(self.policy, GenerativeActor)
            self._losses = GenerativeLosses(config, networks, self.policy)
        self._optimizer = JointOptimizer(
            self._losses.groups(),
            config.grad_clip,
            modules={
                "policy": self.policy,
                "own": self._losses.beside_policy,
                "target": self._losses.target,
            },
            averages=[(self._losses.target, self._losses.online)],
            tau=config.tau,
        )
        self.step = 0

    def update(self, batch: Batch) -> dict[str, Tensor]:
        losses, metrics = self._losses(batch, noise_at(self._seed, self.step, self._device))
        self._optimizer.descend(losses)
        self.step += 1
        return {**loss_metrics(losses), **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {**self._optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)
        self.step = state["step"]
