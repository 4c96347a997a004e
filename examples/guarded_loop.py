"""A control loop with a guard: each step says which actions were limited, refused or missed, and goes on.

omcda-deploy serve --demo --config guard.toml &
python guarded_loop.py 127.0.0.1:8500 127.0.0.1:8501 127.0.0.1:8502
"""

import sys
import time
from collections import Counter

import numpy as np

from omcda_deploy import ContractError, EndpointError, RemoteTeam, make_environment


def run(team, environment, steps, period):
    """Act for some steps, `period` seconds apart; return the reward and how many actions were of which kind."""
    observations, _ = environment.reset(seed=0)
    team.reset()
    standstill = {agent.name: np.zeros(agent.action.size, np.float32) for agent in team.spec.agents}
    kinds, total = Counter(), 0.0
    for _ in range(steps):
        began = time.monotonic()
        try:
            decisions = team.act(observations)
            actions = {name: decision.action for name, decision in decisions.items()}
            kinds.update(map(kind, decisions.values()))
        except (ContractError, EndpointError):  # refused: an observation with NaN or unlike the data
            actions = standstill  # whatever is safe on your robots
            kinds["refused"] += len(actions)
        observations, rewards, terminated, truncated, _ = environment.step(actions)
        total += rewards[team.spec.names[0]]
        if any(terminated.values()) or any(truncated.values()):
            break
        time.sleep(max(0.0, period - (time.monotonic() - began)))
    return total, kinds


def kind(decision):
    """Say where an action is from."""
    if decision.fallback:
        return "held"  # the answer did not come in time
    if decision.policy_weight is not None and decision.policy_weight < 1:
        return "limited"  # by the guard; policy_weight is what it left of the policy
    return "policy"


def main(endpoints, steps=200, deadline_s=0.05):
    with RemoteTeam(endpoints, deadline_s=deadline_s, fallback="hold") as team:
        environment = make_environment(team.spec.task)  # or your robots
        total, kinds = run(team, environment, steps, 1 / team.spec.control_rate)
    print(f"reward {total:.1f}; actions: {', '.join(f'{n} {name}' for name, n in kinds.most_common())}")


if __name__ == "__main__":
    main(sys.argv[1:] or [f"127.0.0.1:{port}" for port in range(8500, 8503)])
