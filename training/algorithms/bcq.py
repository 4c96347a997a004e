"""BCQ: batch-constrained Q-learning for teams (Fujimoto et al., ICML 2019, 1812.02900).

Every agent maximises its own Q_i, but only over actions that the data make likely; a monotone mixer makes the
agents' own maxima the team's. Bars: target networks, no gradient; m = 1 - terminal; e_i in every network's input.

Continuous: likely actions are those of a conditional VAE, moved a little by a perturbation xi,

    L_vae = mean[(D(o,z) - a)^2] + (1/2) KL(E(z|o,a) || N(0, 1)),     both means over entries
    a^k   = clip(D(o,z^k) + phi tanh xi(o, D(o,z^k)), -1, 1),         z^k ~ N(0, 1) clamped to [-0.5, 0.5]
    q*_i  = max_k [ 0.75 min(Qbar1_i, Qbar2_i) + 0.25 max(Qbar1_i, Qbar2_i) ](o'_i, abar^k_i)      (k = 1..10)
    y     = r + gamma m Qbar_tot(s'; q*),         L_Q = (Q1_tot - y)^2 + (Q2_tot - y)^2
    L_xi  = -Q1_i(o_i, a_i),                      gradient through xi alone.

The policy is the best of 100 candidates by Q1, decoded from latents that were drawn once from a fixed seed and are
kept in it. So it is a deterministic function of the observation, exported as a tanh-Gaussian without width.

Discrete: likely actions are those with ``G(a|o) / max_a' G(a'|o) >= threshold`` under the cloned behaviour G,

    a*_i = argmax over likely available a of Q_i(o'_i, a),
    L_Q  = (Q_tot(s, a) - [r + gamma m Qbar_tot(s', a*)])^2,         policy: the same argmax at o.

G is the dataset's behaviour model, which every run has; a second classifier would estimate the same.

Deviations from published code: the VAE decodes sampled latents with the inputs in the order it was trained on (the
released one swaps z and e_i); the latent has 2 A entries as in BCQ, not 2 N (``latent=team``); the discrete policy
keeps its restriction when it acts (OG-MARL drops it), its targets follow softly, and its loss has no factor 1/2.

Source: docs/baselines.md#bcq.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.actions import clear, entry_mean, padding_of
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Categorical, Distribution
from omcda_deploy.training.fleet import Noise, column, mean_per_run
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.mlp import AgentMLP
from omcda_deploy.training.networks import TIE, GreedyActor, NetworkFactory, total_value
from omcda_deploy.training.optimizer import Group, JointOptimizer, frozen, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    BatchSize,
    Choice,
    Discount,
    GradientNorm,
    LearningRate,
    MixerWidth,
    Range,
    SampleCount,
    StandardizeStates,
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
PER_RUN = ("threshold", "phi", "pessimism", "kl_weight")

LATENT_LIMIT = 0.5  # beyond it the decoder gives actions that the data hardly hold
LATENT_SEED = 0
ENCODER_LOG_STD = (-4.0, 15.0)
NO_WIDTH = -20.0  # log std of the exported policy: noise of any likely size moves an action by less than 1e-7
DEPLOYED_LIMIT = 0.999  # nearer to +-1, atanh is mostly rounding in float32, and no two runtimes would agree


@dataclass(frozen=True)
class Config:
    """Settings of BCQ as published for MA-MuJoCo (continuous) and SMAC (discrete)."""

    threshold: Annotated[Unit, "discrete: least G/max G of an allowed action; 0 allows all"] = 0.4
    phi: Annotated[float, Range(0.0, 2.0), "continuous: largest move of an action by the perturbation"] = 0.05
    target_samples: Annotated[int, Range(1, 1024), "continuous: actions per agent of a target's maximum"] = 10
    candidates: Annotated[SampleCount, "continuous: actions per agent that the policy chooses among"] = 100
    pessimism: Annotated[Unit, "continuous: weight of the smaller Qbar; the larger has the rest"] = 0.75
    latent: Annotated[str, Choice("action", "team"), "size of z: 2 A, or 2 N as in published code"] = "action"
    kl_weight: Annotated[Weight, "continuous: weight of the KL term in the loss of the VAE"] = 0.5
    vae_hidden: Annotated[Width, "continuous: units of the VAE's hidden layers"] = 64
    mixer: Annotated[str, Choice("linear", "vdn", "qmix"), "how the agents' values are joined"] = "linear"
    lr: LearningRate = 5e-4
    gamma: Discount = 0.99
    tau: Tau = 0.005
    grad_clip: GradientNorm = 1.0
    batch_size: BatchSize = 128
    hidden: Width = 256
    mixer_hidden: MixerWidth = 64
    standardize_states: StandardizeStates = False

    def __post_init__(self) -> None:
        check(self)


class GenerativeActor(nn.Module):
    """Choose by ``q`` among perturbed samples of the decoder, whose latents never change.

    All shapes begin with R where its networks are those of R runs.
    """

    latents: Tensor  # [candidates, L], the same for all runs
    padding: Tensor | None  # of the actions

    def __init__(self, config: Config, networks: NetworkFactory) -> None:
        super().__init__()
        spec = networks.spec
        o, a, n = spec.observation_size, spec.action_size, len(spec.agents)
        self.action, self.latent = a, 2 * (a if config.latent == "action" else n)
        self.phi: float | Tensor = config.phi  # or [R, 1, 1, 1, 1]
        self.decoder = networks.make(lambda: AgentMLP(o + self.latent, a, n, config.vae_hidden))
        self.perturbation = networks.make(lambda: AgentMLP(o + a, a, n, networks.hidden))
        self.q: Any = networks.q()
        generator = torch.Generator().manual_seed(LATENT_SEED)
        latents = torch.randn((config.candidates, self.latent), generator=generator)
        self.register_buffer("latents", latents.clamp(-LATENT_LIMIT, LATENT_LIMIT))
        self.register_buffer("padding", padding_of(spec), persistent=False)

    def decode(self, observation: Tensor, latents: Tensor, agent: int | None = None) -> Tensor:
        """Decode ``[B, (N,) O]``, latents [K, B, (N,) L] or broadcastable -> actions [K, B, (N,) A]."""
        return clear(torch.tanh(self.decoder.branch(observation, latents, agent)), self.padding, agent)

    def perturb(self, xi: Any, observation: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Return ``clip(a + phi tanh xi(o, a), -1, 1)``: ``[B, (N,) O], [K, B, (N,) A] -> [K, B, (N,) A]``."""
        move = torch.tanh(xi.branch(observation, action, agent))
        return clear((action + self.phi * move).clamp(-1.0, 1.0), self.padding, agent)

    def candidates(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Make candidates: ``[B, (N,) O] -> (actions [K, B, (N,) A], their values [K, B, (N)])``."""
        latents = self.latents[:, None, None] if agent is None else self.latents[:, None]
        if observation.ndim == 4:
            runs, batch, agents, _ = observation.shape
            latents = latents.expand(runs, -1, batch, agents, -1)
        decoded = self.decode(observation, latents, agent)
        actions = self.perturb(self.perturbation, observation, decoded, agent)
        return actions.clamp(-DEPLOYED_LIMIT, DEPLOYED_LIMIT), self.q.candidates(observation, actions, agent)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[B, (N,) O] -> (atanh of the action [B, (N,) A], log_std [B, (N,) A] of no width)``."""
        actions, values = self.candidates(observation, agent)
        axis = 1 if observation.ndim == 4 else 0  # of the candidates
        best = values.argmax(axis)[(*[slice(None)] * axis, None, ..., None)]  # [1, B, (N,) 1]
        action = actions.gather(axis, best.expand(*[-1] * observation.dim(), self.action)).squeeze(axis)
        mean = 0.5 * (torch.log(1.0 + action) - torch.log(1.0 - action))  # atanh, which ONNX opset 17 lacks
        return mean, torch.full_like(mean, NO_WIDTH)

    def as_good(self, observation: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Test if ``action`` [B, (N,) A] is a best candidate up to rounding, bool [B, (N)]; for one run."""
        actions, values = self.candidates(observation, agent)
        best = values.amax(0)
        near = values >= best - TIE * (1.0 + best.abs())
        return (near & ((actions - action).abs() <= TIE).all(-1)).any(0)


class RestrictedActor(nn.Module):
    """Take ``argmax q`` over the available actions that ``behavior`` makes likely, as a degenerate categorical.

    All shapes begin with R where its networks are those of R runs.
    """

    def __init__(self, config: Config, networks: NetworkFactory) -> None:
        super().__init__()
        self.threshold = config.threshold
        self.least: float | Tensor = least_ratio(config.threshold)  # or [R, 1, 1, 1]
        q: Any = networks.q()
        self.greedy = GreedyActor(q)
        self.behavior: Any = networks.actor().requires_grad_(False)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, (N,) O]``, mask [B, (N,) A] -> log-probabilities, 0 at the choice, else the lowest float."""
        likely = allowed(self.behavior(observation, mask, agent), mask, self.least)
        log_probs: Tensor = self.greedy(observation, likely, agent)
        return log_probs

    def as_good(self, observation: Tensor, mask: Tensor, action: Tensor, agent: int | None = None) -> Tensor:
        """Test as :meth:`GreedyActor.as_good`; an action on the threshold up to rounding may be allowed or not."""
        log_g = self.behavior(observation, mask, agent)
        possible = allowed(log_g, mask, least_ratio(self.threshold, slack=-TIE))
        certain = allowed(log_g, mask, least_ratio(self.threshold, slack=TIE))
        among = certain | (F.one_hot(action, mask.shape[-1]).bool() & possible)
        as_good: Tensor = self.greedy.as_good(observation, among, action, agent)
        return as_good


def least_ratio(threshold: float, slack: float = 0.0) -> float:
    """Return the least ``log G - max log G`` of an allowed action; ``slack`` is in nats."""
    return min(math.log(threshold) + slack, 0.0) if threshold > 0.0 else -math.inf


def allowed(log_g: Tensor, mask: Tensor, least: float | Tensor) -> Tensor:
    """Mark available a with ``log G(a) - max log G >= least``: log G and mask [..., A] -> bool."""
    return (log_g - log_g.amax(-1, keepdim=True) >= least) & mask.bool()


def vae_loss(
    decoded: Tensor, action: Tensor, mean: Tensor, log_std: Tensor, kl_weight: Tensor, padding: Tensor | None
) -> Tensor:
    """Return L_vae: ``mean (a^ - a)^2 + kl_weight mean KL(N(mean, std) || N(0, 1))``, means over all entries.

    Four times [R, B, N, ...], ``kl_weight`` [R], ``padding`` [N, A] of the actions -> [R].
    """
    kl = 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0) - log_std
    return entry_mean((decoded - action).square(), padding) + kl_weight * mean_per_run(kl)


def pessimistic_maximum(q1: Tensor, q2: Tensor, pessimism: Tensor) -> Tensor:
    """Return ``max_k [p min(q1, q2) + (1 - p) max(q1, q2)]``: [R, K, B, N] -> [R, B, N]; p is [R, 1, 1, 1]."""
    return (pessimism * torch.minimum(q1, q2) + (1.0 - pessimism) * torch.maximum(q1, q2)).amax(1)


class GenerativeLosses:
    """Losses of VAE, twin critics and perturbation, for continuous actions."""

    q1_target: Any
    q2_target: Any

    def __init__(self, configs: Sequence[Config], networks: NetworkFactory, policy: GenerativeActor) -> None:
        config, device = configs[0], str(policy.latents.device)
        self._config, self._policy = config, policy
        policy.phi = column(configs, "phi", device)[..., None, None, None]
        self._pessimism = column(configs, "pessimism", device)[..., None, None]
        self._kl_weight = column(configs, "kl_weight", device)[:, 0]
        spec = networks.spec
        sizes = (spec.observation_size + spec.action_size, 2 * policy.latent, len(spec.agents))
        self.encoder = networks.make(lambda: AgentMLP(*sizes, config.vae_hidden))
        self.q2, self.mixer = networks.q(), networks.mixer(config.mixer_hidden, config.mixer)
        self.beside_policy = nn.ModuleList((self.encoder, self.q2, self.mixer)).to(device)
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

    def __call__(self, batch: Batch, noise: Noise) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return losses and metrics."""
        policy = self._policy
        o, a = batch.observation, clear(batch.action, policy.padding)
        mean, log_std = self.encoder(torch.cat((o, a), -1)).chunk(2, -1)
        log_std = log_std.clamp(*ENCODER_LOG_STD)
        z = mean + log_std.exp() * noise.normal(*mean.shape[1:])
        with torch.no_grad():
            y = self._bellman(batch, noise)
            decoded = policy.decode(o, self._latents(o, 1, noise))  # [R, 1, B, N, A]
        q1, q2 = (total_value(self.mixer, q(o, a), batch.state) for q in (policy.q, self.q2))
        with frozen(policy.q):
            perturbed = policy.perturb(policy.perturbation, o, decoded)
            value = policy.q.candidates(o, perturbed)
        reconstructed = policy.decode(o, z.unsqueeze(1)).squeeze(1)
        losses = {
            "policy": -mean_per_run(value),  # L_xi
            "critic": mean_per_run((q1 - y).square()) + mean_per_run((q2 - y).square()),  # L_Q
            "vae": vae_loss(reconstructed, a, mean, log_std, self._kl_weight, policy.padding),  # L_vae
        }
        distance = entry_mean((perturbed.detach() - decoded).abs(), policy.padding)
        return losses, {"value/reward_total": q1.detach().mean(1), "perturbation": distance}

    def _bellman(self, batch: Batch, noise: Noise) -> Tensor:
        c, o2 = self._config, batch.next_observation
        decoded = self._policy.decode(o2, self._latents(o2, c.target_samples, noise))
        actions = self._policy.perturb(self.perturbation_target, o2, decoded)
        q1, q2 = (q.candidates(o2, actions) for q in (self.q1_target, self.q2_target))
        best = pessimistic_maximum(q1, q2, self._pessimism)
        next_q_tot = total_value(self.mixer_target, best, batch.next_state)
        return batch.reward + c.gamma * batch.not_done * next_q_tot

    def _latents(self, observation: Tensor, count: int, noise: Noise) -> Tensor:
        latents = noise.normal(count, *observation.shape[1:3], self._policy.latent)
        return latents.clamp_(-LATENT_LIMIT, LATENT_LIMIT)


class RestrictedLosses:
    """The loss of one critic whose targets use the policy's own choice, for discrete actions."""

    q_target: Any

    def __init__(self, configs: Sequence[Config], networks: NetworkFactory, policy: RestrictedActor) -> None:
        config, device = configs[0], next(policy.parameters()).device
        self._config, self._policy = config, policy
        self._least = torch.tensor([least_ratio(c.threshold) for c in configs], device=device)
        self._least = policy.least = self._least[:, None, None, None]
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.beside_policy = nn.ModuleList((self.mixer,)).to(device)
        self.online = nn.ModuleList((policy.greedy.q, self.mixer))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        return [Group(parameters_of(self.online), self._config.lr)]

    def __call__(self, batch: Batch, noise: Noise) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return losses and metrics."""
        c, q = self._config, self._policy.greedy.q
        with torch.no_grad():
            likely = self._likely(batch.next_behavior, batch.next_mask)
            best = self.q_target(batch.next_observation, choice(q.values(batch.next_observation), likely))
            next_q_tot = total_value(self.mixer_target, best, batch.next_state)
            y = batch.reward + c.gamma * batch.not_done * next_q_tot
        scores = q.values(batch.observation)
        data_values = scores.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        q_tot = total_value(self.mixer, data_values, batch.state)
        with torch.no_grad():
            likely = self._likely(batch.behavior, batch.mask)
            metrics = {
                "value/reward_total": q_tot.mean(1),
                "kl": -batch.behavior.log_prob(choice(scores, likely)).mean(1),
                "allowed": likely.sum(-1).float().mean(1),
            }
        return {"critic": mean_per_run((q_tot - y).square())}, metrics  # L_Q

    def _likely(self, behavior: Distribution, mask: Tensor | None) -> Tensor:
        """Mark the actions that the policy chooses among, bool [R, B, N, A]."""
        assert isinstance(behavior, Categorical)
        assert mask is not None  # the sampler gives every discrete batch its masks
        return allowed(behavior.log_probs, mask, self._least)


def choice(values: Tensor, likely: Tensor) -> Tensor:
    """Return :class:`RestrictedActor`'s choice int64 [R, B, N] by values and marks [R, B, N, A]."""
    return values.masked_fill(~likely, -math.inf).argmax(-1)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    kind = GenerativeActor if networks.spec.action_kind == "continuous" else RestrictedActor
    return kind(config, networks)


class Algorithm:
    """Train R runs by BCQ: one :meth:`update` is one gradient step of each on its batch."""

    budgets = alpha = None

    def __init__(
        self,
        configs: Sequence[Config],
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """Build ``behavior``, the runs' cloned pi_b, into discrete policies, whose actions it allows."""
        config = self.config = configs[0]
        self.policy = make_policy(config, networks).to(device)
        self._losses: GenerativeLosses | RestrictedLosses
        if isinstance(self.policy, RestrictedActor):
            self.policy.behavior = copy.deepcopy(behavior).to(device).requires_grad_(False)
            self._losses = RestrictedLosses(configs, networks, self.policy)
        else:
            assert isinstance(self.policy, GenerativeActor)
            self._losses = GenerativeLosses(configs, networks, self.policy)
        self.noise = Noise(networks.seeds or (), device)
        self._optimizer = JointOptimizer(
            self._losses.groups(),
            config.grad_clip,
            modules={"policy": self.policy, "own": self._losses.beside_policy, "target": self._losses.target},
            averages=[(self._losses.target, self._losses.online)],
            tau=config.tau,
        )
        self.step = 0

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        return self.compute(batch, self.begin(watched))

    def begin(self, watched: bool) -> tuple[()]:
        self.noise.at(self.step)
        self.step += 1
        return ()  # every step is like the others

    def compute(self, batch: Batch, plan: tuple[()]) -> dict[str, Tensor]:
        losses, metrics = self._losses(batch, self.noise)
        self._optimizer.descend(losses)
        return {**loss_metrics(losses), **metrics}

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
