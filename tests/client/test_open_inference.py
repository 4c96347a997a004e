"""Teams behind other servers of the Open Inference Protocol act as they do in process, to the last digit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy import cli, registry
from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.errors import ConfigError, ContractError, EndpointError, MissedAnswerError
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.policy import NoiseSource
from tests.client.test_client import assert_same, masks, observations
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.server_process import ServerProcess, server_process
from tests.support.stand_in import stand_in


@pytest.fixture(params=["continuous", "discrete"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(f"{request.param}_bundle")  # type: ignore[no-any-return]


@pytest.mark.parametrize(("states_contract", "typed"), [(True, False), (False, True)])
def test_a_bundle_in_another_server_acts_as_in_process(
    bundle: Bundle, states_contract: bool, typed: bool
) -> None:
    spec, local = bundle.spec, LocalTeam(bundle)
    with (
        stand_in(bundle.path, parameters=states_contract) as (endpoint, service),
        RemoteTeam([endpoint], protocol="oip", bundle=None if states_contract else bundle.path) as team,
    ):
        service.typed = typed
        assert (team.spec, team.version, team.divergence_kind) == (spec, "1", bundle.divergence_kind)
        assert team.budgets == bundle.budgets
        for rows in (1, 4):
            seen = observations(spec, rows)
            allowed = masks(spec, rows) if spec.action_kind == "discrete" else None
            for noise in (None, NoiseSource(spec, 5).draw(rows)):
                expected = local.act(seen, noise=noise, action_masks=allowed)
                assert_same(team.act(seen, noise=noise, action_masks=allowed), expected)
        assert set(service.calls) == set(spec.names)
        assert set(team.latencies) == set(spec.names)


def test_the_joint_graph_can_be_asked_for(continuous_bundle: Bundle) -> None:
    seen = observations(continuous_bundle.spec, 2)
    alone = Path(continuous_bundle.path)
    with stand_in(alone) as (endpoint, service):
        for agent in continuous_bundle.spec.names:
            del service._configs[agent]
        with RemoteTeam([endpoint], protocol="oip") as team:
            assert set(team.endpoints) == {TEAM}
            assert_same(team.act(seen), JointTeam(continuous_bundle).act(seen))


def test_our_own_server_is_one_of_them(continuous_bundle: Bundle, continuous_server: ServerProcess) -> None:
    seen = observations(continuous_bundle.spec, 2)
    with (
        RemoteTeam([continuous_server.endpoint], protocol="oip") as team,
        RemoteTeam([continuous_server.endpoint]) as other,
    ):
        assert team.bundle_digest == other.bundle_digest == continuous_bundle.digest
        team.reset()
        assert_same(team.act(seen), other.act(seen))
        assert team.act(seen)["agent_0"].policy_weight is not None


def test_agents_may_be_on_several_servers(continuous_bundle: Bundle) -> None:
    seen = observations(continuous_bundle.spec, 2)
    names = continuous_bundle.spec.names
    with (
        server_process(continuous_bundle, names[0]) as one,
        server_process(continuous_bundle, *names[1:]) as two,
        RemoteTeam([two.endpoint, one.endpoint], protocol="oip", bundle=continuous_bundle) as team,
    ):
        assert team.endpoints[names[0]] == one.endpoint
        assert_same(team.act(seen), LocalTeam(continuous_bundle).act(seen))


def test_what_does_not_fit_is_said_when_it_connects(
    continuous_bundle: Bundle, discrete_bundle: Bundle, tmp_path: Path
) -> None:
    other = write_test_bundle(tmp_path / "other", continuous_spec(agents=2))
    with stand_in(continuous_bundle.path, parameters=False) as (endpoint, _):
        for arguments, error, words in (
            ({}, EndpointError, "states no contract that can be read .* give the bundle with --bundle"),
            ({"bundle": discrete_bundle}, EndpointError, "expected inputs .* serve the bundle of this team"),
            ({"bundle": other}, EndpointError, "team: expected inputs .* serve the bundle of this team"),
            ({"bundle": continuous_bundle, "stream": True}, ConfigError, "stream: expected none"),
            (
                {"bundle": continuous_bundle, "record": tmp_path / "r"},
                ConfigError,
                "record: expected protocol",
            ),
            (
                {"bundle": continuous_bundle, "spec": other.spec},
                ContractError,
                "contract|agents",
            ),
        ):
            with pytest.raises(error, match=words):
                RemoteTeam([endpoint], protocol="oip", **arguments)
    with pytest.raises(ConfigError, match="protocol: expected omcda or oip, got 'http'"):
        RemoteTeam(["127.0.0.1:9"], protocol="http")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with (
        stand_in(tmp_path / "empty") as (endpoint, _),
        pytest.raises(EndpointError, match="serves none of team, agent_0: load the bundle's models"),
    ):
        RemoteTeam([endpoint], protocol="oip")


def test_misses_and_their_fallbacks_are_those_of_our_own_protocol(continuous_bundle: Bundle) -> None:
    spec = continuous_bundle.spec
    seen = observations(spec, 1)
    with stand_in(continuous_bundle.path) as (endpoint, _):
        team = RemoteTeam([endpoint], protocol="oip", fallback="hold", deadline_s=1.0)
        strict = RemoteTeam([endpoint], protocol="oip", deadline_s=1.0)
        last = team.act(seen)
    with team, strict:
        decisions = team.act(seen)
        assert all(decision.fallback for decision in decisions.values())
        assert {n: d.action.tobytes() for n, d in decisions.items()} == {
            n: d.action.tobytes() for n, d in last.items()
        }
        assert team.missed == dict.fromkeys(spec.names, 1)
        with pytest.raises(MissedAnswerError, match="cannot be reached"):
            strict.act(seen)


def test_an_evaluation_has_the_returns_of_one_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "toy/chain-mixed"
    bundle = write_test_bundle(tmp_path / "bundle", registry.team_spec(task))
    expected = evaluate(LocalTeam(bundle), task, episodes=4, num_envs=2, temperature=1.0)

    def command(*words: str) -> int:
        out = str(tmp_path / "out.json")
        run = ["evaluate", task, "--episodes", "4", "--num-envs", "2", "--temperature", "1", "--json", out]
        monkeypatch.setattr("sys.argv", ["omcda-deploy", *run, *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return int(exit_info.value.code or 0)

    bare = tmp_path / "bare"
    shutil.copytree(bundle.path, bare)
    with stand_in(bare) as (endpoint, _), stand_in(bare, parameters=False) as (silent, _):
        for words in (["--endpoints", endpoint], ["--endpoints", silent, "--bundle", str(bundle.path)]):
            assert command("--protocol", "oip", *words) == 0
            played: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
            assert played["returns"] == np.asarray(expected.returns).tolist()
        assert command("--endpoints", silent, "--protocol", "oip") == 2
        assert command("--bundle", str(bundle.path), "--protocol", "oip") == 2
    assert "expected --endpoints, which speak it" in capsys.readouterr().err
