"""A simulator of your own in 30 lines: three robots on a line keep their distances while their leader wanders.

    omcda-deploy collect --env own_simulator:Convoy --tier random --transitions 20000 --out convoy.hdf5
    omcda-deploy train convoy.hdf5 --steps 4000 --set hidden=64 --out run

Run in this folder; docs/tutorials/own-simulator.md goes on to a served team.
"""

import numpy as np
from gymnasium.spaces import Box


class Convoy:
    possible_agents = ["front", "middle", "rear"]
    metadata = {"render_fps": 10}  # control steps per second
    max_steps = 100

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (2,))  # metres to the one ahead and to the one behind

    def action_space(self, agent):
        return Box(-1.0, 1.0, (1,))  # velocity, metres per second

    def reset(self, seed=None, options=None):
        self.random, self.steps = np.random.default_rng(seed), 0
        self.x, self.leader = np.array([-1.0, -2.0, -3.0]) + self.random.normal(0, 0.2, 3), 0.0
        return self.observe(), {}

    def step(self, actions):
        self.leader += 0.1 * self.random.normal(0.5, 0.5)
        self.x = self.x + 0.1 * np.concatenate([actions[agent] for agent in self.possible_agents])
        self.steps += 1
        reward = -float(np.square(self.gaps() - 1.0).sum())  # every gap should be one metre
        each = lambda value: dict.fromkeys(self.possible_agents, value)  # noqa: E731
        return self.observe(), each(reward), each(False), each(self.steps >= self.max_steps), {}

    def gaps(self):
        return -np.diff([self.leader, *self.x])

    def observe(self):
        gaps = np.append(self.gaps(), 0.0).astype(np.float32)  # behind the last one is nobody
        return {agent: gaps[i : i + 2] for i, agent in enumerate(self.possible_agents)}
