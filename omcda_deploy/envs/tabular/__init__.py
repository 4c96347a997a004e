"""Tabular team games with closed-form solutions, which :mod:`omcda_deploy.envs.toy` plays."""

from omcda_deploy.envs.tabular.budget import budget_optimum, divergences
from omcda_deploy.envs.tabular.games import (
    GAMES,
    SCALES,
    Chain,
    ChainGame,
    Game,
    OneStepGame,
    Table,
    central_state,
    chain_game,
    game,
    one_step_game,
    team_spec,
)
from omcda_deploy.envs.tabular.solutions import (
    Transitions,
    best_return,
    exact_return,
    require_policies,
    transitions,
)

__all__ = [
    "GAMES",
    "SCALES",
    "Chain",
    "ChainGame",
    "Game",
    "OneStepGame",
    "Table",
    "Transitions",
    "best_return",
    "budget_optimum",
    "central_state",
    "chain_game",
    "divergences",
    "exact_return",
    "game",
    "one_step_game",
    "require_policies",
    "team_spec",
    "transitions",
]
