from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import BLOCK, Episode
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.datasets.merging import concatenate
from omcda_deploy.datasets.summary import render_table, summarize
from omcda_deploy.datasets.writer import DatasetWriter, write_dataset
from omcda_deploy.errors import DatasetError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from tests.support.digests import digest_of

HOPPER = "mamujoco/hopper-3x1"
Arrays = dict[str, NDArray[Any]]


def omiga_loader(path: Path) -> Arrays:
    """Read a file by the rule of OMIGA's own loader (docs/baselines.md#datasets-and-batches), apart from ours."""
    with h5py.File(path) as file:
        o, s, a, r, d = (np.array(file[name]) for name in "osard")
    transitions: dict[str, list[Any]] = {
        name: [] for name in ("o", "s", "a", "r", "mask", "o_next", "s_next")
    }
    for t in range(len(d) - 1):
        if d[t, 0] == 0:
            values = (o[t], s[t], a[t], r.reshape(-1, 1)[t], 1 - d.reshape(-1, 1)[t + 1], o[t + 1], s[t + 1])
            for name, value in zip(transitions, values, strict=True):
                transitions[name].append(value)
    return {name: np.array(values) for name, values in transitions.items()}


def published(rows: Sequence[int], tail: int = 0, seed: int = 0) -> Arrays:
    """Arrays of a file like OMIGA's: float64, episodes of ``rows`` transitions, `s` equal to `o`, no metadata."""
    generator = np.random.default_rng(seed)
    total = sum(length + 1 for length in rows) + tail
    ends = np.cumsum([length + 1 for length in rows]) - 1
    d = np.zeros((total, 1))
    d[ends] = 1
    o = generator.normal(size=(total, 3, 14))
    return {
        "o": o,
        "s": o,
        "a": generator.uniform(-1.2, 1.2, (total, 3, 1)),
        "r": generator.normal(size=(total, 1)),
        "d": d,
    }


def save(path: Path, arrays: Mapping[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def episodes(lengths: Sequence[int], spec: TeamSpec, seed: int = 0) -> list[Episode]:
    generator = np.random.default_rng(seed)
    shape = (len(spec.agents), spec.observation_size)
    own = np.arange(shape[1]) < [[agent.observation_size] for agent in spec.agents]
    return [
        Episode(
            observations,
            observations.reshape(length + 1, -1),
            generator.uniform(-1, 1, (length, shape[0], spec.action_size)).astype(np.float32),
            generator.normal(size=length).astype(np.float32),
            timeout=False,
        )
        for length in lengths
        for observations in [(own * generator.normal(size=(length + 1, *shape))).astype(np.float32)]
    ]


def record(
    path: Path, spec: TeamSpec, data: Sequence[Episode], timeouts: Sequence[bool], label: str
) -> DatasetWriter:
    with DatasetWriter(path, spec, {"behavior": label, "seed": 3}) as writer:
        for index, episode in enumerate(data):
            writer.append(dataclasses.replace(episode, timeout=timeouts[index], seed=100 + index), label)
    return writer


@pytest.fixture(scope="module")
def hopper() -> TeamSpec:
    return registry.team_spec(HOPPER)


def test_omigas_loader_reads_ours_as_we_do(tmp_path: Path, hopper: TeamSpec) -> None:
    data = episodes([4, 7, 3], hopper)
    record(tmp_path / "d.hdf5", hopper, data, [False, True, False], "expert")
    theirs, ours = omiga_loader(tmp_path / "d.hdf5"), read(tmp_path / "d.hdf5")
    t = ours.transitions
    np.testing.assert_array_equal(theirs["o"], np.concatenate([e.observations[:-1] for e in data]))
    np.testing.assert_array_equal(theirs["o_next"], np.concatenate([e.observations[1:] for e in data]))
    np.testing.assert_array_equal(theirs["a"], np.concatenate([e.actions for e in data]))
    np.testing.assert_array_equal(theirs["o"], ours.observations[t])
    np.testing.assert_array_equal(theirs["o_next"], ours.observations[t + 1])
    np.testing.assert_array_equal(theirs["s_next"].reshape(14, -1), ours.states[t + 1])
    np.testing.assert_array_equal(theirs["a"], ours.actions[t])
    np.testing.assert_array_equal(theirs["r"][:, 0], ours.rewards[t])
    np.testing.assert_array_equal(theirs["mask"][:, 0], 1 - ours.done(time_limit_is_terminal=True))
    assert np.flatnonzero(ours.done(time_limit_is_terminal=False)).tolist() == [3, 13]
    assert np.flatnonzero(ours.timeout).tolist() == [10]


def test_what_we_wrote_comes_back(tmp_path: Path, hopper: TeamSpec) -> None:
    data = episodes([4, 7, 3], hopper)
    writer = record(tmp_path / "d.hdf5", hopper, data, [False, True, False], "expert")
    dataset = read(tmp_path / "d.hdf5", HOPPER)
    assert dataset.spec == hopper
    assert dataset.episode_start.tolist() == [0, 5, 13]
    assert dataset.episode_length.tolist() == [4, 7, 3]
    assert dataset.episode_seeds is not None
    assert dataset.episode_seeds.tolist() == [100, 101, 102]
    assert dataset.metadata == {"behavior": "expert", "seed": 3, "task": HOPPER}
    assert dataset.behaviors == ("expert",)
    np.testing.assert_allclose(dataset.episode_returns, [e.rewards.sum() for e in data])
    assert dataset.digest == writer.digest
    with h5py.File(tmp_path / "d.hdf5") as file:
        assert file["s"] == file["o"]  # one copy on disk
    assert dataset.digest == digest_of(tmp_path / "d.hdf5", 2)
    copies = (dataset.episode(number) for number in range(3))
    summary = write_dataset(
        tmp_path / "again.hdf5", hopper, copies, metadata=dataset.metadata, behavior="expert"
    )
    assert summary["digest"] == dataset.digest
    again = read(tmp_path / "again.hdf5")
    assert again.metadata == dataset.metadata
    np.testing.assert_array_equal(again.timeout, dataset.timeout)
    np.testing.assert_array_equal(again.episode_returns, dataset.episode_returns)


def test_published_files_need_no_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = published([1000, 12, 999])
    path = save(tmp_path / "Hopper-v2-3x1-expert.hdf5", {**arrays, "r": arrays["r"][:, 0]})
    dataset = read(path)
    assert dataset.spec.task == HOPPER
    assert np.flatnonzero(dataset.timeout).tolist() == [999]
    assert np.flatnonzero(dataset.terminal).tolist() == [1011, 2010]
    np.testing.assert_allclose(
        dataset.episode_returns,
        [arrays["r"][:1000].sum(), arrays["r"][1001:1013].sum(), arrays["r"][1014:2013].sum()],
        rtol=1e-5,
    )
    assert np.shares_memory(dataset.states, dataset.observations)
    assert dataset.states.shape == (2014, 42)
    theirs = omiga_loader(save(tmp_path / "x.hdf5", arrays))
    np.testing.assert_array_equal(dataset.observations[dataset.transitions], theirs["o"].astype(np.float32))
    np.testing.assert_array_equal(dataset.done(True), 1 - theirs["mask"][:, 0])
    assert not caplog.messages
    assert read(tmp_path / "x.hdf5").spec.task == HOPPER  # by shape
    assert "x.hdf5 does not say of which task it is, and is taken for mamujoco/hopper-3x1" in caplog.text
    assert read(tmp_path / "x.hdf5").digest == dataset.digest  # neither the name nor r's shape matters


def test_an_unfinished_tail_has_transitions_and_no_episode(tmp_path: Path) -> None:
    arrays = published([3, 2], tail=4)
    dataset = read(save(tmp_path / "d.hdf5", arrays))
    theirs = omiga_loader(tmp_path / "d.hdf5")
    np.testing.assert_array_equal(dataset.rewards[dataset.transitions, None], theirs["r"].astype(np.float32))
    assert dataset.transitions.tolist() == [0, 1, 2, 4, 5, 7, 8, 9]
    assert dataset.done(True).tolist() == [False, False, True, False, True, False, False, False]
    assert dataset.episode_length.tolist() == [3, 2]
    assert summarize(dataset)["transitions_without_end"] == 3


def decentralised() -> TeamSpec:
    return TeamSpec(
        task="test/decentralised",
        agents=(
            AgentSpec("a", 2, ActionSpec("continuous", 1)),
            AgentSpec("b", 3, ActionSpec("continuous", 1)),
        ),
        state_size=5,
        control_rate=10.0,
    )


def test_a_centralised_state_of_its_own_is_kept_once(tmp_path: Path) -> None:
    spec = decentralised()
    (episode,) = episodes([6], spec)
    state = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    with DatasetWriter(tmp_path / "d.hdf5", spec, {}) as writer:
        writer.append(dataclasses.replace(episode, states=state, episode_return=1.5))
    dataset = read(tmp_path / "d.hdf5")
    np.testing.assert_array_equal(dataset.states, state)
    assert dataset.episode_seeds is None
    assert dataset.episode_returns.tolist() == [1.5]
    np.testing.assert_array_equal(omiga_loader(tmp_path / "d.hdf5")["s"], np.stack([state[:-1]] * 2, axis=1))
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        file["s"][4, 1, 2] += 1
    with pytest.raises(DatasetError, match="array s: expected 2 equal copies"):
        read(tmp_path / "d.hdf5")


def test_states_that_are_not_the_observations_are_joined(tmp_path: Path) -> None:
    arrays = published([5] * 3)
    arrays["s"] = arrays["s"] + 1
    dataset = read(save(tmp_path / "d.hdf5", arrays))
    np.testing.assert_array_equal(dataset.states, arrays["s"].reshape(18, 42).astype(np.float32))


def test_one_float32_copy(tmp_path: Path, hopper: TeamSpec) -> None:
    rows = 40 * BLOCK
    path = save(tmp_path / "big.hdf5", published([rows // 2 - 1] * 2))
    read(path)  # imports and caches of the first call do not count
    tracemalloc.start()
    dataset = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = (dataset.observations, dataset.actions, dataset.rewards, dataset.rewards, dataset.transitions)
    needed = sum(values.nbytes for values in arrays)
    assert dataset.observations.dtype == np.float32
    assert peak < needed + 0.4 * dataset.observations.nbytes  # a float64 or second copy would be 1 to 2 times


def break_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(name: str, where: Any, value: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            file[name][where] = value

    return apply


def replace(name: str, values: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file[name]
            if values is not None:
                file[name] = values

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no such file"),
        (break_file, "truncated or not HDF5"),
        (lambda path: path.write_text("not a dataset"), "truncated or not HDF5"),
        (replace("a", None), "expected arrays o, s, a, r, d, found no a"),
        (replace("a", np.array([b"x"])), "array a: expected numbers"),
        (replace("o", np.zeros((12, 42))), r"array o: expected shape \[R, N, O\]"),
        (replace("a", np.zeros((12, 2, 1))), r"array a: expected shape \[12, 3, …\], got \[12, 2, 1\]"),
        (replace("r", np.zeros(11)), r"array r: expected shape \[12, 1\], got \[11\]"),
        (replace("d", np.zeros((12, 3))), r"array d: expected shape \[12, 1\], got \[12, 3\]"),
        (replace("s", np.zeros((12, 3, 5))), "array s: mamujoco/hopper-3x1 has a state of 42"),
        (change("o", (7, 1, 3), np.nan), "array o holds NaN or infinity, first in row 7"),
        (change("r", (4, 0), np.inf), "array r holds NaN or infinity, first in row 4"),
        (change("d", (2, 0), 0.5), "array d: expected 0 or 1, got 0.5 in row 2"),
        (change("d", slice(None), 0), "no episode ends"),
        (change("d", slice(None), 1), "every row has d=1, so there is no transition"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = save(tmp_path / "Hopper-v2-3x1-medium.hdf5", published([5, 5]))
    assert read(path).transitions.size == 10
    damage(path)
    with pytest.raises(DatasetError, match=message):
        read(path)


def test_nan_in_an_episodes_last_row_is_padding(tmp_path: Path) -> None:
    arrays = published([BLOCK - 1, BLOCK, 5], tail=3)
    ends = np.flatnonzero(arrays["d"])
    expected = read(save(tmp_path / "plain.hdf5", arrays))
    arrays["a"][[*ends, -1]] = np.nan
    arrays["r"][[*ends, -1]] = np.nan
    padded = read(save(tmp_path / "padded.hdf5", arrays))
    rows = expected.transitions
    np.testing.assert_array_equal(padded.actions[rows], expected.actions[rows])
    np.testing.assert_array_equal(padded.rewards[rows], expected.rewards[rows])
    np.testing.assert_array_equal(padded.episode_returns, expected.episode_returns)
    assert np.isfinite(padded.actions).all()
    # A final observation that was not recorded is that of the row before; here the rows around a block's edge too.
    arrays["o"] = arrays["s"] = arrays["o"].copy()
    arrays["o"][ends] = np.nan
    padded = read(save(tmp_path / "unseen.hdf5", arrays))
    assert {BLOCK - 1, 2 * BLOCK} <= set(ends)
    np.testing.assert_array_equal(padded.observations[ends], expected.observations[ends - 1])
    np.testing.assert_array_equal(padded.observations[rows], expected.observations[rows])
    assert np.shares_memory(padded.states, padded.observations)
    arrays["o"][ends[0]] = expected.observations[ends[0]]
    arrays["o"][ends[0], 0, 0] = np.nan  # in part: neither recorded nor left out
    with pytest.raises(DatasetError, match=f"array o holds NaN or infinity, first in row {ends[0]}"):
        read(save(tmp_path / "part.hdf5", arrays))


def test_states_of_their_own_may_be_padded_too(tmp_path: Path) -> None:
    arrays = published([5, 3])
    arrays["s"] = arrays["s"] + 1
    expected = read(save(tmp_path / "plain.hdf5", arrays))
    arrays["s"][5] = np.nan
    padded = read(save(tmp_path / "padded.hdf5", arrays))
    np.testing.assert_array_equal(padded.states[5], expected.states[4])
    arrays["s"][2] = np.nan
    with pytest.raises(DatasetError, match="array s holds NaN or infinity, first in row 2"):
        read(save(tmp_path / "early.hdf5", arrays))


def test_nan_beyond_the_first_block_names_its_row(tmp_path: Path) -> None:
    arrays = published([BLOCK + 100])
    arrays["a"][BLOCK + 7] = np.nan
    with pytest.raises(DatasetError, match=f"array a holds NaN or infinity, first in row {BLOCK + 7}"):
        read(save(tmp_path / "d.hdf5", arrays))


def test_the_task_must_fit(tmp_path: Path, hopper: TeamSpec) -> None:
    path = save(tmp_path / "d.hdf5", published([5]))
    with pytest.raises(DatasetError, match="ant-2x4 has 2 agents with observations of 113"):
        read(path, "mamujoco/ant-2x4")
    with pytest.raises(UnknownNameError, match="did you mean"):
        read(path, "mamujoco/hopper")
    arrays = published([5])
    with pytest.raises(DatasetError, match="does not say of which task"):
        read(save(path, {**arrays, "a": np.zeros((6, 3, 2))}))
    record(path, hopper, episodes([3], hopper), [False], "x")
    with pytest.raises(DatasetError, match="do not fit together"):
        read(path, "mamujoco/ant-2x4")


def test_changed_contents_are_noticed(tmp_path: Path, hopper: TeamSpec) -> None:
    record(tmp_path / "d.hdf5", hopper, episodes([4], hopper), [False], "x")
    change("r", (2, 0), 9.0)(tmp_path / "d.hdf5")
    with pytest.raises(DatasetError, match="changed after it was written"):
        read(tmp_path / "d.hdf5")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_half_written(tmp_path: Path, hopper: TeamSpec, error: type[BaseException]) -> None:
    target = tmp_path / "d.hdf5"
    target.write_text("what was there before")
    (episode,) = episodes([4], hopper)

    def fail_halfway() -> None:
        with DatasetWriter(target, hopper, {}) as writer:
            writer.append(episode)
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]
    assert target.read_text() == "what was there before"


def test_the_writer_refuses_what_cannot_be_trained_on(tmp_path: Path, hopper: TeamSpec) -> None:
    (episode,) = episodes([4], hopper)
    episode.actions[2, 1] = np.nan
    with pytest.raises(DatasetError, match="array a holds NaN or infinity, first in row 2"):  # noqa: SIM117
        with DatasetWriter(tmp_path / "d.hdf5", hopper, {}) as writer:
            writer.append(episode)
    with pytest.raises(DatasetError, match="at least one episode"):
        write_dataset(tmp_path / "d.hdf5", hopper, [])
    with pytest.raises(DatasetError, match="cannot be written"), DatasetWriter(tmp_path, hopper, {}):
        pass
    assert not list(tmp_path.iterdir())


def test_concatenate_keeps_episodes_and_where_they_came_from(tmp_path: Path, hopper: TeamSpec) -> None:
    one, two, out = tmp_path / "medium.hdf5", tmp_path / "Hopper-v2-3x1-expert.hdf5", tmp_path / "out.hdf5"
    record(one, hopper, episodes([4, 6], hopper), [False, True], "medium")
    arrays = published([1000, 3], tail=5)
    save(two, arrays)
    concatenate([one, two], out)
    dataset, first = read(out), read(one)
    assert dataset.episode_length.tolist() == [4, 6, 1000, 3]  # the unfinished tail is left out
    assert len(dataset.observations) == 5 + 7 + 1001 + 4
    np.testing.assert_array_equal(dataset.observations[:12], first.observations)
    np.testing.assert_array_equal(dataset.observations[12:], arrays["o"][:1005].astype(np.float32))
    assert dataset.behaviors == ("medium", "Hopper-v2-3x1-expert")
    assert dataset.episode_behaviors is not None
    assert dataset.episode_behaviors.tolist() == [0, 0, 1, 1]
    assert np.flatnonzero(dataset.timeout).tolist() == [9, 1009]
    assert dataset.metadata["behavior"] == "medium+Hopper-v2-3x1-expert"
    assert "seed" not in dataset.metadata  # not the same in both
    np.testing.assert_array_equal(dataset.done(True), 1 - omiga_loader(out)["mask"][:, 0])
    with pytest.raises(DatasetError, match="one of the inputs"):
        concatenate([one, two], one)
    spec = decentralised()
    (episode,) = episodes([3], spec)
    write_dataset(two, spec, [dataclasses.replace(episode, states=np.zeros((4, 5), np.float32))])
    contents = out.read_bytes()
    with pytest.raises(DatasetError, match="do not fit together"):
        concatenate([one, two], out)
    assert out.read_bytes() == contents


def test_summary_counts_what_is_in_transitions(tmp_path: Path) -> None:
    arrays = published([4, 6])
    arrays["a"][:] = 0.5
    arrays["a"][0, 0] = 1.5
    arrays["a"][1, 1] = -0.9995
    arrays["a"][1, 2] = 0.995
    arrays["a"][4] = 3.0  # the row behind an episode: no transition
    arrays["r"][:] = 1
    summary = summarize(read(save(tmp_path / "d.hdf5", arrays)))
    assert summary["share_nearly_saturated"] == pytest.approx(3 / 30)
    assert summary["share_saturated"] == pytest.approx(2 / 30)
    assert summary["share_outside"] == pytest.approx(1 / 30)
    assert summary["largest_action"] == pytest.approx(1.5)
    assert summary["returns"] == {"mean": 5.0, "std": 1.0, "min": 4.0, "max": 6.0}
    assert (summary["episodes"], summary["transitions"], summary["terminals"]) == (2, 10, 2)
    assert summary["shapes"]["states"] == [12, 42]
    assert render_table(summary).row_count > 10
