"""Clients in threads, forked processes, pickles and after their end: each misuse is told in one sentence."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import ContractError, EndpointError
from tests.support.server_process import ROOT, ServerProcess

FORKS = """
import multiprocessing, os, sys
import numpy as np
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.errors import EndpointError

endpoint, stream = sys.argv[1], sys.argv[2] == "stream"

def act(team):
    team.act({agent.name: np.zeros(agent.observation_size, np.float32) for agent in team.spec.agents})

def work():
    try:
        act(team)
    except EndpointError as error:
        assert f"was made in process {os.getppid()}: make one in each process, after the fork" in str(error)
    else:
        raise AssertionError("a client was used in two processes")
    with RemoteTeam(endpoint, stream=stream) as own:
        act(own)
        act(own)

fork = multiprocessing.get_context("fork")
with RemoteTeam(endpoint, stream=stream) as team:
    workers = [fork.Process(target=work) for _ in range(3 if stream else 8)]
    for worker in workers:
        act(team)
        worker.start()
    for worker in workers:
        worker.join(30)
    act(team)
print([worker.exitcode for worker in workers])
"""


def make_team(server: ServerProcess) -> RemoteTeam:
    return RemoteTeam(server.endpoint, deadline_s=30.0)


def make_policy(server: ServerProcess) -> RemotePolicy:
    return RemotePolicy(server.endpoint, "agent_0", deadline_s=30.0)


NO_NUMBERS = r"observation of agent_0: expected numbers of shape .*, got "
MAKERS = pytest.mark.parametrize("make", [make_team, make_policy])
Make = Callable[[ServerProcess], RemoteTeam | RemotePolicy]


def act(client: RemoteTeam | RemotePolicy) -> None:
    if isinstance(client, RemoteTeam):
        client.act({a.name: np.zeros(a.observation_size, np.float32) for a in client.spec.agents})
    else:
        client.act(np.zeros(client.spec.observation_size, np.float32))


@MAKERS
def test_a_client_is_for_one_thread_at_a_time(make: Make, continuous_server: ServerProcess) -> None:
    errors: list[Exception] = []
    answered = 0
    with make(continuous_server) as client:

        def play() -> None:
            nonlocal answered
            for _ in range(200):
                try:
                    act(client)
                    answered += 1
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=play) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        act(client)  # goes on
    assert answered
    assert {type(error) for error in errors} == {EndpointError}
    (message,) = {str(error) for error in errors}
    kind = type(client).__name__
    assert (
        message
        == f"this {kind} is in use by another thread: make one for each thread, or call it under a lock"
    )


@MAKERS
def test_a_closed_client_says_so(make: Make, continuous_server: ServerProcess) -> None:
    client = make(continuous_server)
    client.close()
    client.close()
    with pytest.raises(EndpointError, match=r"is closed: make a new one from its endpoints"):
        act(client)
    with pytest.raises(EndpointError, match=r"is closed: make a new one from its endpoints"):
        client.reset()


@MAKERS
def test_a_client_is_neither_pickled_nor_copied(make: Make, continuous_server: ServerProcess) -> None:
    with make(continuous_server) as client:
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(EndpointError, match="cannot be pickled or copied: send its endpoints"):
                call(client)
        act(client)


@pytest.mark.parametrize("observation", ["near", ["a", "b"], [[1.0], [1.0, 2.0]], {"x": 1}, [1j] * 4])
def test_observations_that_are_no_numbers_are_refused(
    observation: object, continuous_server: ServerProcess
) -> None:
    with make_team(continuous_server) as team, make_policy(continuous_server) as policy:
        with pytest.raises(ContractError, match=NO_NUMBERS):
            team.act(dict.fromkeys(team.spec.names, observation))  # type: ignore[arg-type]
        with pytest.raises(ContractError, match=NO_NUMBERS):
            policy.act(observation)  # type: ignore[arg-type]
        with pytest.raises(ContractError, match=r"no observation for agent_0: expected one per agent, got "):
            team.act(observation)  # type: ignore[arg-type]
        act(team)


@pytest.mark.parametrize("transport", ["calls", "stream"])
def test_forked_processes_make_clients_beside_their_parents(
    transport: str, continuous_server: ServerProcess, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, continuous_server.endpoint, transport],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"{[0] * (3 if transport == 'stream' else 8)}\n", done.stderr


def test_the_users_own_choice_of_forks_stays() -> None:
    code = "import os, omcda_deploy.client; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    for given, expected in (({}, "1"), ({"GRPC_ENABLE_FORK_SUPPORT": "0"}, "0")):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "PYTHONPATH": str(ROOT), **given},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{expected}\n"
