"""The two critics of OMCDA: values of reward and divergence apart, or one value of both.

    Q^r_tot = sum_i w^r_i(s) Q^r_i(o_i,a_i) + b^r(s)         rewards only                  (V^r_tot alike)
    Q^{c,k} = sum_j w^{c,k}_j(s) Q^c_j(o_j,a_j) + b^{c,k}(s) minus discounted divergence   (V^{c,k} alike)

They evaluate the policies ``pi_b exp z`` at prices that need not be the actor's. The losses are those of
:mod:`omcda_deploy.training.algorithms.omcda`. Source: docs/derivation.md#losses.

Shapes: R runs, B batch, N agents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.fleet import mean_per_run
from omcda_deploy.training.influence import weighted_values
from omcda_deploy.training.losses import exp_linear, mix, mix_divergence
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, parameters_of

if TYPE_CHECKING:
    from omcda_deploy.training.algorithms.omcda import Config

# Divergence values are clipped at this many budgets per step for ever: far below what a policy near the budget has.
_DIVERGENCE_MARGIN = 5.0


@dataclass(frozen=True)
class CriticTerms:
    """A critic's view of one batch; everything but ``losses`` is detached."""

    advantage: Tensor  # w^r_i (Q^r_i - V^r_i), in units of reward, [R, B, N]
    correction: Tensor  # kappa_i (Q^c_i - V^c_i), in nats, [R, B, N]
    z: Tensor  # advantage / alpha + correction [R, B, N]
    rho: Tensor  # min(exp z, e^{z_max}) [R, B, N]
    losses: dict[str, Tensor]  # [R] each
    target: Tensor  # y of L_Qr, [R, B]
    metrics: dict[str, Tensor]  # [R] or [R, N] each


def clip_rewards(target: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return ``target`` [R, B] within the data's discounted returns-to-go, and the clipped share [R]."""
    low, high = batch.return_range[:, :1], batch.return_range[:, 1:]
    clipped = torch.maximum(torch.minimum(target, high), low)
    return clipped, mean_per_run((clipped != target).float())


class RecordedValue:
    """The value U(s) of what acted, regressed on recorded returns-to-go: where reward values begin.

    No action enters it: where several policies acted, returns-to-go themselves, as targets of Q, would credit
    actions with what their policy did afterwards. Source: docs/derivation.md#values-that-begin-at-the-data [ours].
    """

    def __init__(self, config: Config, networks: NetworkFactory, device: str) -> None:
        self.network = networks.team_value(config.mixer_hidden).to(device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the regression's loss [R], in units of the largest return-to-go."""
        error = self.network(batch.state) - batch.return_to_go / _largest(batch)
        return {"recorded_value": mean_per_run(error.square())}

    def following(self, batch: Batch) -> Tensor:
        """Return U(s') [R, B] in units of reward: what targets bootstrap from at first."""
        values: Tensor = _largest(batch) * self.network(batch.next_state)
        return values


def _largest(batch: Batch) -> Tensor:
    """The largest size of the data's returns-to-go, [R, 1]."""
    return batch.return_range.abs().amax(-1, keepdim=True).clamp_min(1e-6)


class DecoupledCritic:
    """Separate values of reward and divergence (docs/derivation.md#losses)."""

    def __init__(self, config: Config, networks: NetworkFactory, device: str) -> None:
        self._config = config
        self.q_r, self.v_r = networks.q(), networks.v()
        self.mixer_r = networks.mixer(config.mixer_hidden)
        self.q_c, self.v_c = networks.q(), networks.v()
        self.mixer_c = networks.divergence_mixer(config.divergence_mixer, config.mixer_hidden)
        online = (self.q_r, self.v_r, self.mixer_r, self.q_c, self.v_c, self.mixer_c)
        self.online = nn.ModuleList(online).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_r_target, self.v_r_target, self.mixer_r_target = self.target[:3]
        self.q_c_target, self.v_c_target, self.mixer_c_target = self.target[3:]
        self.recorded = RecordedValue(config, networks, device) if config.value_start == "data" else None

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        lr, lr_c = self._config.lr, self._config.lr_divergence
        return [
            Group(parameters_of(self.q_r, self.mixer_r), lr),
            Group(parameters_of(self.v_r), lr),
            Group(parameters_of(self.q_c, self.mixer_c), lr_c),
            Group(parameters_of(self.v_c), lr_c),
        ]

    def kappa(self, w_c: Tensor, alpha: Tensor) -> Tensor:
        """Return ``sum_k alpha_k w^{c,k}_i / alpha_i``, uncapped: [R, B, N(k), N(i)], [R, 1, N] -> [R, B, N(i)]."""
        return torch.matmul(alpha.unsqueeze(-2), w_c).squeeze(-2) / alpha

    def terms(self, batch: Batch, alpha: Tensor, budgets: Tensor, *, begins: bool = False) -> CriticTerms:
        """Evaluate all losses for the policies at prices ``alpha`` [R, 1, N], whose budgets are [R, N] nats.

        ``begins``: reward values still follow the data's, if the settings say so.
        """
        c = self._config
        recorded = self.recorded if begins else None
        o, s, a = batch.observation, batch.state, batch.action
        o2, s2 = batch.next_observation, batch.next_state
        clipped = {}
        with torch.no_grad():
            w_r, _ = self.mixer_r_target(s)  # [R, B, N]
            w_c, _ = self.mixer_c_target(s)  # [R, B, N(k), N(j)]
            kappa_free = self.kappa(w_c, alpha)
            kappa = kappa_free.clamp_max(c.kappa_max)
            q_r, q_c = self.q_r_target(o, a), self.q_c_target(o, a)
            w_r2, b_r2 = self.mixer_r_target(s2)
            w_c2, b_c2 = self.mixer_c_target(s2)
            discount = c.gamma * batch.not_done
            following = recorded.following(batch) if recorded else mix(w_r2, self.v_r_target(o2), b_r2)
            y_r = batch.reward + discount * following
            y_c = discount.unsqueeze(-1) * mix_divergence(w_c2, self.v_c_target(o2), b_c2)
            if c.clip_targets:
                y_r, clipped["value/clipped"] = clip_rewards(y_r, batch)
                least = -_DIVERGENCE_MARGIN * budgets / (1.0 - c.gamma + 1e-3)
                y_c = torch.maximum(y_c, least.unsqueeze(1)).clamp_max(0.0)
        v_r, v_c = self.v_r(o), self.v_c(o)
        above = q_r - v_r.detach()
        z = w_r / alpha * above + kappa * (q_c - v_c)
        rho = torch.exp(z.detach().clamp_max(c.z_max))

        w_on, b_on = self.mixer_r(s)
        w_con, b_con = self.mixer_c(s)
        q_r_tot = mix(w_on, self.q_r(o, a), b_on)
        q_c_tot = mix_divergence(w_con, self.q_c(o, a), b_con)
        losses = {
            "reward_critic": mean_per_run((q_r_tot - y_r).square()),  # L_Qr
            "divergence_critic": mean_per_run((q_c_tot - y_c).square()),  # L_Qc
            "reward_value": mean_per_run(rho * (q_r - v_r).square()),  # L_Vr
            "divergence_value": mean_per_run(exp_linear(z, c.z_max) / kappa + v_c),  # L_Vc
            **(recorded.losses(batch) if recorded else {}),  # L_U
        }
        with torch.no_grad():
            advantage, correction = w_r * above, kappa * (q_c - v_c)
            total = (alpha * mix_divergence(w_con, v_c, b_con)).sum(-1)
            metrics = {
                "value/reward": (w_on * v_r).mean(1),  # each agent's part of V^r_tot
                "value/reward_total": mix(w_on, v_r, b_on).mean(1),
                "value/divergence_total": total.mean(1),  # at most 0 in theory; not clamped
                "value/kappa_capped": mean_per_run((kappa_free > c.kappa_max).float()),
                **clipped,
            }
        return CriticTerms(advantage, correction, z.detach(), rho, losses, y_r, metrics)

    def reward_values(self, batch: Batch, action: Tensor | None) -> Tensor:
        """Return ``w^r_i Q^r_i`` in the shape of :func:`weighted_values`."""
        weights, _ = self.mixer_r_target(batch.state)
        return weighted_values(self.q_r_target, weights, batch.observation, action)

    def total_values(self, batch: Batch, action: Tensor | None, alpha: Tensor) -> Tensor:
        """Return ``w^r_i Q^r_i + alpha_i kappa_i Q^c_i``, under which m_i equals alpha_i over many steps."""
        w_c, _ = self.mixer_c_target(batch.state)
        price = alpha * self.kappa(w_c, alpha).clamp_max(self._config.kappa_max)
        divergence_values = weighted_values(self.q_c_target, price, batch.observation, action)
        return self.reward_values(batch, action) + divergence_values


class EntangledCritic:
    """The ablation w/o-dq: one Q and V for reward and divergence, as in OMIGA (docs/derivation.md#ablations)."""

    def __init__(self, config: Config, networks: NetworkFactory, device: str) -> None:
        self._config = config
        self.q, self.v = networks.q(), networks.v()
        self.mixer = networks.mixer(config.mixer_hidden)
        self.online = nn.ModuleList((self.q, self.v, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.v_target, self.mixer_target = self.target
        self.recorded = RecordedValue(config, networks, device) if config.value_start == "data" else None

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        lr = self._config.lr
        return [Group(parameters_of(self.q, self.mixer), lr), Group(parameters_of(self.v), lr)]

    def terms(self, batch: Batch, alpha: Tensor, budgets: Tensor, *, begins: bool = False) -> CriticTerms:
        """Evaluate all losses for the policies at prices ``alpha`` [R, 1, N].

        ``begins``: values still follow the data's, if the settings say so.
        """
        c = self._config
        recorded = self.recorded if begins else None
        clipped = {}
        with torch.no_grad():
            w, _ = self.mixer_target(batch.state)
            q_target = self.q_target(batch.observation, batch.action)
            w2, b2 = self.mixer_target(batch.next_state)
            v2 = self.v_target(batch.next_observation)
            following = recorded.following(batch) if recorded else mix(w2, v2, b2)
            y = batch.reward + c.gamma * batch.not_done * following
            if c.clip_targets:
                y, clipped["value/clipped"] = clip_rewards(y, batch)
        v = self.v(batch.observation)
        z = w / alpha * (q_target - v)
        w_on, b_on = self.mixer(batch.state)
        q_tot = mix(w_on, self.q(batch.observation, batch.action), b_on)
        losses = {
            "reward_critic": mean_per_run((q_tot - y).square()),  # L_Q of OMIGA
            # L_V of OMIGA, exp continued.
            "reward_value": mean_per_run(exp_linear(z, c.z_max) + w * v / alpha),
            **(recorded.losses(batch) if recorded else {}),  # L_U
        }
        with torch.no_grad():
            metrics = {
                "value/reward": (w_on * v).mean(1),
                "value/reward_total": mix(w_on, v, b_on).mean(1),
                **clipped,
            }
        z = z.detach()
        rho = torch.exp(z.clamp_max(c.z_max))
        return CriticTerms(z * alpha, torch.zeros_like(z), z, rho, losses, y, metrics)

    def reward_values(self, batch: Batch, action: Tensor | None) -> Tensor:
        """Return ``w_i Q_i`` in the shape of :func:`weighted_values`."""
        weights, _ = self.mixer_target(batch.state)
        return weighted_values(self.q_target, weights, batch.observation, action)

    def total_values(self, batch: Batch, action: Tensor | None, alpha: Tensor) -> Tensor:
        """Return the same, as Q holds both reward and divergence."""
        return self.reward_values(batch, action)
