"""``omcda-deploy convert``: properties common to all foreign formats."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.datasets import Episode, Recording
from omcda_deploy.datasets.convert import convert, return_to_go, source_digest
from omcda_deploy.datasets.formats import pymarl_hdf5
from omcda_deploy.datasets.merging import concatenate
from omcda_deploy.datasets.minari_export import write_minari
from omcda_deploy.datasets.smac_teams import team_spec
from omcda_deploy.errors import ContractError, DatasetError, OmcdaError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec, require_same_contract
from tests.support.smac_episodes import SmacEpisode, pymarl_batch, random_episode, save_madt, save_pymarl

EPISODES = [random_episode(steps, steps, mappo=False) for steps in (3, 4)]


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A file of oxwhirl's SMAC."""
    batch = pymarl_batch(EPISODES, [False, False], [True, True])
    return save_pymarl(tmp_path / "5m_vs_6m medium.h5", batch)


@pytest.fixture(scope="module")
def mappo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its MAPPO variant, and our file of it beside."""
    source = tmp_path_factory.mktemp("data") / "5m_vs_6m"
    save_madt(source, a=random_episode(3, 0, mappo=True), b=random_episode(2, 1, mappo=True))
    convert(source, source.with_suffix(".hdf5"))
    return source


def command(*arguments: str | Path) -> str:
    """Standard output. Raises what the command raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_reading_a_foreign_file_names_the_command_that_converts_it(
    stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stock.parent)
    with pytest.raises(
        DatasetError, match=r"is a file of PyMARL's episodes .* convert it first, with  omcda-"
    ) as raised:
        registry.read_dataset(stock)
    words = shlex.split(str(raised.value).partition("with  omcda-deploy ")[2])
    summary = json.loads(command(*words))
    dataset = registry.read_dataset(summary["path"])
    assert (summary["episodes"], summary["transitions"]) == (2, 7)
    assert summary["digest"] == dataset.digest
    assert summary["return_mean"] == dataset.episode_returns.mean()
    assert dataset.spec.task == "smac/5m_vs_6m"


def test_return_to_go_replaces_rewards_and_not_returns(stock: Path) -> None:
    assert return_to_go(np.array([1.0, 2.0, -4.0])).tolist() == [-1.0, -2.0, -4.0]
    tenths = np.full(1000, 0.1, np.float16)  # a sum of such numbers soon grows no more
    assert return_to_go(tenths)[0] == tenths.sum(dtype=np.float64)
    for mode in ("reward", "return_to_go"):
        command("convert", stock, "--out", stock.with_name(f"{mode}.hdf5"), "--reward-mode", mode)
    plain, rtg = (
        registry.read_dataset(stock.with_name(f"{name}.hdf5")) for name in ("reward", "return_to_go")
    )
    for number, episode in enumerate(EPISODES):
        start, steps = int(rtg.episode_start[number]), len(episode.rewards)
        expected = [episode.rewards[t:].sum() for t in range(steps)]
        assert rtg.rewards[start : start + steps].tolist() == expected
        assert plain.rewards[start : start + steps].tolist() == episode.rewards.tolist()
    assert rtg.episode_returns.tolist() == plain.episode_returns.tolist()
    assert rtg.metadata["reward_mode"] == "return_to_go"
    assert rtg.digest != plain.digest
    with pytest.raises(
        DatasetError, match="expected the rewards of steps, got a dataset of reward mode return_to"
    ):
        write_minari(rtg, stock.with_name("sums-v0"))
    files = [stock.with_name(f"{name}.hdf5") for name in ("reward", "return_to_go")]
    with pytest.raises(
        DatasetError, match="fit together: reward mode reward against return_to_go: import both"
    ):
        concatenate(files, stock.with_name("both.hdf5"))


def test_the_two_variants_of_smac_do_not_mix(stock: Path, mappo: Path) -> None:
    sizes = "observation_size: 124 against 55"
    ours = registry.read_dataset(mappo.with_suffix(".hdf5"))
    with pytest.raises(ContractError, match=sizes):
        require_same_contract(ours.spec, registry.team_spec("smac/5m_vs_6m"), "the dataset", "the task")
    with pytest.raises(DatasetError, match=sizes):
        registry.read_dataset(mappo.with_suffix(".hdf5"), "smac/5m_vs_6m")
    out = stock.with_name("out.hdf5")
    with pytest.raises(ContractError, match=sizes):
        convert(mappo, out, task="smac/5m_vs_6m")
    with pytest.raises(ContractError, match="observation_size: 55 against 124"):
        convert(stock, out, task="smac-mappo/5m_vs_6m")
    assert convert(mappo, out, task="smac-mappo/5m_vs_6m")["task"] == "smac-mappo/5m_vs_6m"


def test_the_map_comes_from_the_path_or_the_task(stock: Path) -> None:
    unnamed = stock.rename(stock.with_name("data.h5"))
    out = stock.with_name("out.hdf5")
    with pytest.raises(
        DatasetError,
        match=r"expected one of the maps 10m_vs_11m, .*, 3m, .* in the path: name it with --task smac/",
    ):
        convert(unnamed, out)
    with pytest.raises(UnknownNameError, match="did you mean 'smac/5m_vs_6m'"):
        convert(unnamed, out, task="smac/5m_vs_6n")
    with pytest.raises(
        DatasetError, match=r"\(6, 78, 14\) of smac/6h_vs_8z or \(6, 172, 14\) of .* got \(5, 55, 12\)"
    ):
        convert(unnamed, out, task="smac/6h_vs_8z")
    assert convert(unnamed, out, task="smac/5m_vs_6m")["task"] == "smac/5m_vs_6m"
    inner = stock.with_name("corridor") / "15m_vs_6m" / "5m_vs_6m_x"
    inner.mkdir(parents=True)
    moved = unnamed.rename(inner / "5m_vs_6ms.h5")
    assert convert(moved, stock.with_name("again.hdf5"))["task"] == "smac/5m_vs_6m"


@pytest.mark.parametrize(
    ("task", "observations", "choices", "state"),
    [("5m_vs_6m", 124, 12, 780), ("6h_vs_8z", 172, 14, 1278), ("corridor", 346, 30, 2610)],
)
def test_the_mappo_variants_sizes_are_the_published_ones(
    task: str, observations: int, choices: int, state: int
) -> None:
    stock = registry.team_spec(f"smac/{task}")
    spec = team_spec(
        Path(task),
        agents=len(stock.agents),
        observation_size=observations,
        choices=choices,
        state_size=state,
        task=None,
    )
    assert (spec.task, spec.observation_size, spec.state_size) == (f"smac-mappo/{task}", observations, state)
    assert (spec.episode_limit, spec.control_rate) == (stock.episode_limit, stock.control_rate)


def test_agents_states_are_stored_once_each(mappo: Path, tmp_path: Path) -> None:
    dataset = registry.read_dataset(mappo.with_suffix(".hdf5"))
    with h5py.File(mappo.with_suffix(".hdf5")) as file:
        assert file["s"].shape == (7, 5, 156)
        np.testing.assert_array_equal(file["s"][:].reshape(7, -1), dataset.states)
    assert concatenate([mappo.with_suffix(".hdf5")], tmp_path / "again.hdf5") == dataset.digest
    np.testing.assert_array_equal(registry.read_dataset(tmp_path / "again.hdf5").states, dataset.states)


def test_bad_arguments_leave_nothing(stock: Path) -> None:
    out, empty = stock.with_name("out.hdf5"), stock.with_name("empty")
    empty.mkdir()
    ours = stock.with_name("ours.hdf5")
    convert(stock, ours)
    files = sorted(stock.parent.iterdir())
    attempts: list[tuple[type[OmcdaError], str, list[str | Path]]] = [
        (DatasetError, "exists already", [stock, "--out", stock]),
        (DatasetError, r"expected a name ending in \.hdf5", [stock, "--out", "out.npz"]),
        (DatasetError, "no such file or folder", [stock.with_name("no.h5"), "--out", out]),
        (DatasetError, "pymarl_hdf5: file of PyMARL's", [empty, "--out", out]),
        (UnknownNameError, "did you mean 'og_vault'", [stock, "--out", out, "--format", "og_vaults"]),
        (DatasetError, "found no files", [stock, "--out", out, "--format", "madt_episodes"]),
        (DatasetError, "needs no import: train, replay and inspect read it", [ours, "--out", out]),
    ]
    for error, message, arguments in attempts:
        with pytest.raises(error, match=message):
            command("convert", *arguments)
    assert sorted(stock.parent.iterdir()) == files


def test_a_conversion_that_fails_late_leaves_nothing(stock: Path) -> None:
    files = sorted(stock.parent.iterdir())
    calls: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(stock, stock.with_name("out.hdf5"), progress=interrupt)
    assert calls == [(1, 2), (2, 2)]
    assert sorted(stock.parent.iterdir()) == files


def test_episodes_that_do_not_fit_the_spec_are_named(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(first: SmacEpisode, **changed: object) -> None:
        episode = Episode(
            first.observations,
            first.states,
            first.actions,
            first.rewards,
            timeout=False,
            action_masks=first.masks.astype(np.uint8),
            label="here",
        )
        bad = replace(episode, **changed)  # type: ignore[arg-type]

        @contextmanager
        def opened(path: Path, task: str | None) -> Iterator[Recording]:
            yield Recording(registry.team_spec("smac/5m_vs_6m"), 2, iter([episode, bad]))

        monkeypatch.setattr(pymarl_hdf5, "open_recording", opened)
        convert(stock, stock.with_name("out.hdf5"))

    good = EPISODES[0]
    with pytest.raises(
        DatasetError, match=r"here: observations: expected shape \[4, 5, 55\].* got \[4, 5, 54\]"
    ):
        attempt(good, observations=good.observations[..., 1:])
    with pytest.raises(DatasetError, match=r"here: states: expected shape \[4, 98\].* got \[3, 98\]"):
        attempt(good, states=good.states[1:])
    with pytest.raises(
        DatasetError, match="expected 1 to 70 steps, the episode limit of smac/5m_vs_6m, got 0"
    ):
        attempt(good, actions=good.actions[:0])
    long = random_episode(71, 0, mappo=False)
    with pytest.raises(DatasetError, match=r"expected 1 to 70 steps, .* got 71"):
        attempt(long)
    assert not stock.with_name("out.hdf5").exists()


def test_the_source_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "x").write_bytes(b"1")
        (tmp_path / folder / "y").write_bytes(b"2")
    digest = source_digest(tmp_path / "a")
    assert digest == source_digest(tmp_path / "b")
    (tmp_path / "b" / "y").write_bytes(b"3")
    assert source_digest(tmp_path / "b") != digest
    (tmp_path / "a" / "y").rename(tmp_path / "a" / "z")
    assert source_digest(tmp_path / "a") != digest
    assert source_digest(tmp_path / "b" / "inner" / "x") == (
        "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    )


def own_layout(path: Path) -> Path:
    """A file of another program: five episodes of 4 steps and an unfinished one, of two agents."""
    generator = np.random.default_rng(0)
    observations, final = generator.normal(size=(27, 2, 3)).astype(np.float32), np.arange(27) % 5 == 4
    with h5py.File(path, "w") as file:
        file["o"], file["s"], file["r"] = observations, observations, np.ones((27, 1))
        file["a"], file["d"] = generator.uniform(-2, 2, (27, 2, 1)), final[:, None].astype(np.float32)
    return path


def test_a_file_in_our_layout_is_imported_with_its_team(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, team, out = own_layout(tmp_path / "own.hdf5"), tmp_path / "team.json", tmp_path / "d.hdf5"
    action = ActionSpec("continuous", 1, -2.0, 2.0)
    spec = TeamSpec(
        "cell/own", (AgentSpec("l", 3, action), AgentSpec("r", 3, action)), 6, 5.0, episode_limit=4
    )
    team.write_text(json.dumps(spec.to_json()))
    with pytest.raises(
        DatasetError, match=r"does not say of which team it is: name a known task .* --team FILE"
    ):
        command("import", source, "--out", out)
    for task, message in ((None, "name the task"), ("cell/own", "unknown task 'cell/own'")):
        with pytest.raises(
            OmcdaError, match=rf"{message}.*first  omcda-deploy import FILE --team TEAM --out"
        ):
            registry.read_dataset(source, task)
    command("import", source, "--team", team, "--out", out)
    dataset = registry.read_dataset(out)
    assert dataset.spec == spec
    assert dataset.episode_length.tolist() == [4] * 5
    assert dataset.timeout.sum() == 5, "as long as the team's limit"
    assert "the last 1 rows are no whole episode" in caplog.messages[0]
    with h5py.File(source) as file:
        np.testing.assert_array_equal(dataset.observations, file["o"][:25])
    with pytest.raises(DatasetError, match="actions: expected numbers from -1 to 1 of agent_"):
        command("import", source, "--task", "cell/own", "--control-rate", "5", "--out", tmp_path / "no.hdf5")
    with pytest.raises(DatasetError, match="needs no import"):
        command("import", out, "--team", team, "--out", tmp_path / "no.hdf5")
