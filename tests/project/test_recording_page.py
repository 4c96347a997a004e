"""docs/recording.md: its blocks are run as they stand, but for ports and the size of the training run."""

from __future__ import annotations

import re
from pathlib import Path

from omcda_deploy import registry
from omcda_deploy.datasets.recorded_tables import CSV_COLUMNS
from omcda_deploy.recordings.recorder import QUEUE_BYTES
from omcda_deploy.registry import read_dataset
from omcda_deploy.serve.config import ServerConfig, read_server_config
from omcda_deploy.serve.recording import PARAMETERS
from tests.support.bundles import write_test_bundle
from tests.support.pages import DOCS, run_in_shell

PAGE = (DOCS / "recording.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
SMALLER = "--steps 2 --behavior-steps 2 --set hidden=8 --set mixer_hidden=4"


def test_the_blocks_run(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", registry.team_spec("toy/chain"), seed=1)
    run_in_shell(PAGE, tmp_path, [("--steps 20000", SMALLER)])
    dataset = read_dataset(tmp_path / "next.hdf5")
    assert len(dataset.episode_length) == 23
    assert dataset.behavior is not None
    assert dataset.spec == registry.team_spec("toy/chain")


def test_the_page_says_what_the_code_does(tmp_path: Path) -> None:
    (text,) = (text for language, text in BLOCKS if language == "toml")
    (tmp_path / "serve.toml").write_text(text)
    config = read_server_config(tmp_path / "serve.toml")
    assert config.recording == ServerConfig().recording
    assert config.record_folder == tmp_path / "servers"
    for name in (*PARAMETERS, *CSV_COLUMNS):
        assert f"`{name}`" in PAGE
    assert f"{QUEUE_BYTES >> 20} MiB wait" in PAGE
