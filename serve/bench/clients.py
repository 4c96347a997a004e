"""This package's own client under measurement: what a control step costs the process that asks.

The other scenarios are asked by :mod:`omcda_deploy.serve.bench.http2`, which costs a fraction of it.
"""

from __future__ import annotations

import time

import numpy as np

from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.play.measurements import Latency
from omcda_deploy.serve.bench.load import Timings
from omcda_deploy.serve.bench.measured_servers import MESSAGES, Servers
from omcda_deploy.spec import TeamSpec


class ClientLoop:
    """A control loop of a :class:`RemoteTeam`, which asks all models of ``servers``."""

    def __init__(self, servers: Servers, spec: TeamSpec, stream: bool) -> None:
        draw = np.random.default_rng(0)
        self._observations = [
            {a.name: draw.standard_normal(a.observation_size).astype(np.float32) for a in spec.agents}
            for _ in range(MESSAGES)
        ]
        self._team = RemoteTeam(dict(servers.endpoints), stream=stream)

    def warm_up(self, seconds: float) -> Timings:
        return self.run(seconds)

    def run(self, seconds: float) -> Timings:
        """Run steps, one after another, during ``seconds``."""
        latencies: list[float] = []
        now = start = time.perf_counter()
        while now < start + seconds:
            began = now
            self._team.act(self._observations[len(latencies) % MESSAGES])
            now = time.perf_counter()
            latencies.append(now - began)
        return Timings(Latency(np.array(latencies)), now - start, 0)

    def close(self) -> None:
        self._team.close()
