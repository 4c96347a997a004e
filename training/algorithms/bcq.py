"""BCQ: batch-constrained Q-learning for teams (Fujimoto et al., ICML 2019, 1812.02900; baselines.md section 2).

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
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.learner import Group, Learner, frozen, parameters_of
from omcda_deploy.training.networks import TIE, AgentMLP, GreedyActor, NetworkFactory, total_value
from omcda_deploy.training.settings import require, require_choice

PAPER = "Off-Policy Deep Reinforcement Learning without Exploration (2019), with OMIGA's networks"
SUMMARY = "maximises Q over actions that the data make likely"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "neg_log_behavior", "discrete": "neg_log_behavior"}

LATENT_LIMIT = 0.5  # beyond it the decoder gives actions that the data hardly hold
LATENT_SEED = 0
ENCODER_LOG_STD = (-4.0, 15.0)
NO_WIDTH = -20.0  # log std of the exported policy: noise of any likely size moves an action by less than 1e-7
# atanh of an action nearer to +-1 is mostly rounding in float32, and no two runtimes would agree on it.
DEPLOYED_LIMIT = 0.999


@dataclass(frozen=True)
class Config:
    """Settings of BCQ as published for MA-MuJoCo (continuous) and SMAC (discrete)."""

    threshold: float = 0.4  # discrete: least G/max G of an allowed action; 0 allows all
    phi: float = 0.05  # continuous: how far the perturbation moves an action
    target_samples: int = 10  # continuous: actions per agent that a target is maximised over
    candidates: int = 100  # continuous: actions per agent that the policy chooses among
    pessimism: float = 0.75  # continuous: weight of the smaller of the two Qbar, the larger has the rest
    latent: str = "action"  # continuous: size of z, action (2 A) | team (2 N, as in the published team code)
    kl_weight: float = 0.5
    vae_hidden: int = 64
    mixer: str = "linear"  # linear | vdn | qmix
    lr: float = 5e-4
    gamma: float = 0.99
    tau: float = 0.005
    grad_clip: float = 1.0  # norm, per group of parameters
    batch_size: int = 128
    hidden: int = 256
    mixer_hidden: int = 64

    def __post_init__(self) -> None:
        require_choice(self, latent=("action", "team"), mixer=("linear", "vdn", "qmix"))
        require(
            self,
            threshold=(0.0, 1.0),
            phi=(0.0, 2.0),
            target_samples=(1, 1024),
            candidates=(1, 10**5),
            pessimism=(0.0, 1.0),
            kl_weight=(0.0, 1e6),
            vae_hidden=(1, 65536),
            lr=(0.0, 1.0),
            gamma=(0.0, 1.0),
            tau=(1e-6, 1.0),
            grad_clip=(1e-6, math.inf),
            batch_size=(1, 10**6),
            hidden=(1, 65536),
            mixer_hidden=(1, 65536),
        )


class GenerativeActor(nn.Module):
    """The best by ``q`` of perturbed samples of the decoder, from latents that never change."""

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
        drawn = torch.randn((config.candidates, self.latent), generator=generator)
        self.register_buffer("latents", drawn.clamp(-LATENT_LIMIT, LATENT_LIMIT))

    def decode(self, observation: Tensor, latents: Tensor, agent: int | None = None) -> Tensor:
        """``[B, (N,) O]``, latents [K, B, (N,) L] or broadcastable -> actions [K, B, (N,) A]."""
        return torch.tanh(self.decoder.branch(observation, latents, self.latent, agent))

    def perturb(self, xi: Any, observation: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """``clip(a + phi tanh xi(o, a), -1, 1)``: ``[B, (N,) O], [K, B, (N,) A] -> [K, B, (N,) A]``."""
        move = torch.tanh(xi.branch(observation, action, self.action, agent))
        return (action + self.phi * move).clamp(-1.0, 1.0)

    def candidates(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """``[B, (N,) O] -> (actions [K, B, (N,) A], their values [K, B, (N)])``."""
        latents = self.latents[:, None, None] if agent is None else self.latents[:, None]
        decoded = self.decode(observation, latents, agent)
        actions = self.perturb(self.perturbation, observation, decoded, agent)
        return actions.clamp(-DEPLOYED_LIMIT, DEPLOYED_LIMIT), self.q.candidates(observation, actions, agent)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """``[B, (N,) O] -> (atanh of the action [B, (N,) A], log_std [B, (N,) A] of no width)``."""
        actions, values = self.candidates(observation, agent)
        best = values.argmax(0)[None, ..., None]  # [1, B, (N,) 1]
        action = actions.gather(0, best.expand(*[-1] * observation.dim(), self.action)).squeeze(0)
        mean = 0.5 * (torch.log(1.0 + action) - torch.log(1.0 - action))  # atanh, which ONNX opset 17 lacks
        return mean, torch.full_like(mean, NO_WIDTH)

    def as_good(self, observation: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Whether ``action`` [B, (N,) A] is a best candidate up to rounding, bool [B, (N)]; export's check asks."""
        actions, values = self.candidates(observation, agent)
        best = values.amax(0)
        near = values >= best - TIE * (1.0 + best.abs())
        as_good: Tensor = (near & ((actions - action).abs() <= TIE).all(-1)).any(0)
        return as_good


class RestrictedActor(nn.Module):
    """``argmax q`` over the available actions that ``behavior`` makes likely, as a degenerate categorical."""

    def __init__(self, config: Config, networks: NetworkFactory) -> None:
        super().__init__()
        self.threshold = config.threshold
        q: Any = networks.q()
        self.greedy = GreedyActor(q)
        self.behavior: Any = networks.actor().requires_grad_(False)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """``[B, (N,) O]``, mask [B, (N,) A] -> log-probabilities, 0 at the choice, else the lowest float."""
        likely = allowed(self.behavior(observation, mask, agent), mask, self.threshold)
        log_probs: Tensor = self.greedy(observation, likely, agent)
        return log_probs

    def as_good(self, observation: Tensor, mask: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """As :meth:`GreedyActor.as_good`; an action on the threshold up to rounding may be allowed or not."""
        log_g = self.behavior(observation, mask, agent)
        possible = allowed(log_g, mask, self.threshold, slack=-TIE)
        certain = allowed(log_g, mask, self.threshold, slack=TIE)
        among = certain | (F.one_hot(action, mask.shape[-1]).bool() & possible)
        as_good: Tensor = self.greedy.as_good(observation, among, action, agent)
        return as_good


def allowed(log_g: Tensor, mask: Tensor, threshold: float, slack: float = 0.0) -> Tensor:
    """``G(a) >= threshold max G`` and available, from log G and its mask [..., A] -> bool; ``slack`` in nats."""
    least = min(math.log(threshold) + slack, 0.0) if threshold > 0.0 else -math.inf
    return (log_g - log_g.amax(-1, keepdim=True) >= least) & mask.bool()


def vae_loss(decoded: Tensor, action: Tensor, mean: Tensor, log_std: Tensor, kl_weight: float) -> Tensor:
    """``mean (a^ - a)^2 + kl_weight mean KL(N(mean, std) || N(0, 1))``; both means over all entries."""
    kl = 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0) - log_std
    return (decoded - action).square().mean() + kl_weight * kl.mean()


def pessimistic_maximum(q1: Tensor, q2: Tensor, pessimism: float) -> Tensor:
    """``max_k [p min(q1, q2) + (1 - p) max(q1, q2)]``: [K, B, N] -> [B, N]."""
    return (pessimism * torch.minimum(q1, q2) + (1.0 - pessimism) * torch.maximum(q1, q2)).amax(0)


class GenerativeLearner:
    """Continuous actions: losses of VAE, twin critics and perturbation."""

    q1_target: Any
    q2_target: Any

    def __init__(self, config: Config, networks: NetworkFactory, policy: GenerativeActor) -> None:
        self._config, self._policy = config, policy
        spec = networks.spec
        sizes = (spec.observation_size + spec.action_size, 2 * policy.latent, len(spec.agents))
        self.encoder = AgentMLP(*sizes, config.vae_hidden)
        self.q2, self.mixer = networks.q(), networks.mixer(config.mixer_hidden, config.mixer)
        self.own = nn.ModuleList((self.encoder, self.q2, self.mixer)).to(policy.latents.device)
        self.online = nn.ModuleList((policy.q, self.q2, self.mixer, policy.perturbation))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q1_target, self.q2_target, self.mixer_target, self.perturbation_target = self.target

    def groups(self) -> list[Group]:
        policy, lr = self._policy, self._config.lr
        return [
            Group(parameters_of(policy.perturbation), lr),
            Group(parameters_of(policy.q, self.q2, self.mixer), lr),
            Group(parameters_of(self.encoder, policy.decoder), lr),
        ]

    def losses(self, batch: Batch, noise: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c, policy = self._config, self._policy
        o, a = batch.observation, batch.action
        mean, log_std = self.encoder(torch.cat((o, a), -1)).chunk(2, -1)
        log_std = log_std.clamp(*ENCODER_LOG_STD)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=noise, device=mean.device)
        with torch.no_grad():
            y = self._bellman(batch, noise)
            own = policy.decode(o, self._latents(o, 1, noise))  # [1, B, N, A]
        q1, q2 = (total_value(self.mixer, q(o, a), batch.state) for q in (policy.q, self.q2))
        with frozen(policy.q):
            moved = policy.perturb(policy.perturbation, o, own)
            climbed = policy.q.candidates(o, moved)
        losses = {
            "policy": -climbed.mean(),
            "critic": (q1 - y).square().mean() + (q2 - y).square().mean(),
            "vae": vae_loss(policy.decode(o, z[None])[0], a, mean, log_std, c.kl_weight),
        }
        moves = (moved - own).abs().mean()
        return losses, {"value/reward_total": q1.detach().mean(), "perturbation": moves.detach()}

    def _bellman(self, batch: Batch, noise: torch.Generator) -> Tensor:
        c, o2 = self._config, batch.next_observation
        decoded = self._policy.decode(o2, self._latents(o2, c.target_samples, noise))
        actions = self._policy.perturb(self.perturbation_target, o2, decoded)
        q1, q2 = (q.candidates(o2, actions) for q in (self.q1_target, self.q2_target))
        best = pessimistic_maximum(q1, q2, c.pessimism)
        following = total_value(self.mixer_target, best, batch.next_state)
        return batch.reward + c.gamma * batch.not_done * following

    def _latents(self, observation: Tensor, count: int, noise: torch.Generator) -> Tensor:
        shape = (count, *observation.shape[:2], self._policy.latent)
        drawn = torch.randn(shape, generator=noise, device=observation.device)
        return drawn.clamp_(-LATENT_LIMIT, LATENT_LIMIT)


class RestrictedLearner:
    """Discrete actions: the loss of one critic, whose targets use the policy's own choice."""

    def __init__(self, config: Config, networks: NetworkFactory, policy: RestrictedActor) -> None:
        self._config, self._policy = config, policy
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.own = nn.ModuleList((self.mixer,)).to(next(policy.behavior.parameters()).device)
        self.online = nn.ModuleList((policy.greedy.q, self.mixer))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target

    def groups(self) -> list[Group]:
        return [Group(parameters_of(self.online), self._config.lr)]

    def losses(self, batch: Batch, noise: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c, policy = self._config, self._policy
        assert batch.mask is not None  # the sampler gives every discrete batch its masks
        assert batch.next_mask is not None
        with torch.no_grad():
            choice = policy(batch.next_observation, batch.next_mask).argmax(-1)
            best = self.q_target(batch.next_observation, choice)
            following = total_value(self.mixer_target, best, batch.next_state)
            y = batch.reward + c.gamma * batch.not_done * following
            log_g = policy.behavior(batch.observation, batch.mask)
        scores = policy.greedy.q.values(batch.observation)
        recorded = scores.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        q = total_value(self.mixer, recorded, batch.state)
        with torch.no_grad():
            likely = allowed(log_g, batch.mask, c.threshold)
            own = scores.masked_fill(~likely, -math.inf).argmax(-1, keepdim=True)
            metrics = {
                "value/reward_total": q.mean(),
                "kl": -log_g.gather(-1, own).squeeze(-1).mean(0),
                "allowed": likely.sum(-1).float().mean(0),
            }
        return {"critic": (q - y).square().mean()}, metrics


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """The module that is snapshotted and exported."""
    kind = GenerativeActor if networks.spec.action_kind == "continuous" else RestrictedActor
    return kind(config, networks)


class Algorithm:
    """BCQ's learner: one :meth:`update` is one gradient step on a batch."""

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
        """``behavior`` is the cloned pi_b; of discrete actions it decides which are allowed."""
        self.config, self._seed = config, seed
        self.policy = make_policy(config, networks).to(device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self._parts: GenerativeLearner | RestrictedLearner
        if isinstance(self.policy, RestrictedActor):
            self.policy.behavior.load_state_dict(behavior.state_dict())
            self._parts = RestrictedLearner(config, networks, self.policy)
        else:
            assert isinstance(self.policy, GenerativeActor)
            self._parts = GenerativeLearner(config, networks, self.policy)
        averages = [(self._parts.target, self._parts.online)]
        self._learner = Learner(self._parts.groups(), config.grad_clip, averages=averages, tau=config.tau)
        self._noise = torch.Generator(device)
        self.step = 0

    @property
    def budgets(self) -> None:
        """BCQ has no budget per agent."""
        return None

    @property
    def alpha(self) -> None:
        return None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self._noise.manual_seed(self._seed * 1_000_003 + self.step)
        losses, metrics = self._parts.losses(batch, self._noise)
        self._learner.descend(losses)
        self.step += 1
        return {**{f"loss/{name}": loss.detach() for name, loss in losses.items()}, **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "own": self._parts.own.state_dict(),
            "target": self._parts.target.state_dict(),
            "learner": self._learner.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self._parts.own.load_state_dict(state["own"])
        self._parts.target.load_state_dict(state["target"])
        self._learner.load_state_dict(state["learner"])
        self.step = state["step"]
