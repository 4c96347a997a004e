"""The public API: its names resolve, cheaply, without extras, and a notebook's path through it works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omcda_deploy

SOURCE = Path(omcda_deploy.__file__)
EXTRAS = (
    "torch onnx onnxruntime h5py tensorboard gymnasium gymnasium_robotics mujoco imageio imageio_ffmpeg jax "
    "jaxmarl tensorstore stable_baselines3 grpc_health grpc_reflection prometheus_client uvloop opentelemetry"
)


def run(code: str, *arguments: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_sorted_and_resolve() -> None:
    assert list(omcda_deploy.__all__) == sorted(set(omcda_deploy.__all__))
    for name in omcda_deploy.__all__:
        value = getattr(omcda_deploy, name)
        assert name in dir(omcda_deploy)
        assert name == "export" or value.__module__ == "omcda_deploy", name


def test_type_checkers_see_the_same_names() -> None:
    checked: dict[str, str] = {}
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("omcda_deploy."):
            for alias in node.names:
                assert alias.asname == alias.name
                checked[alias.name] = node.module
    del checked["__version__"]
    assert checked == omcda_deploy._MODULES


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RemoteTaem'"):
        _ = omcda_deploy.RemoteTaem


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = run("import sys, omcda_deploy; print(*sorted(sys.modules))").split()
    assert "omcda_deploy" in loaded
    assert not {"numpy", "grpc", "torch", "typer"} & set(loaded)


def test_every_name_is_imported_without_any_extra() -> None:
    code = """if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in sys.argv[1:]:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        import omcda_deploy
        for name in omcda_deploy.__all__:
            print(name, getattr(omcda_deploy, name) is not None)
    """
    assert run(code, *EXTRAS.split()).split()[::2] == list(omcda_deploy.__all__)


def test_export_is_a_function_whoever_imported_the_package_of_that_name() -> None:
    """In two processes, forked from one that has imported torch and nothing of this package."""
    code = """if True:
        import os, sys
        import torch
        for first in ("omcda_deploy.spec", "omcda_deploy.export.bundle"):
            sys.stdout.flush()
            if os.fork() == 0:
                __import__(first)
                from omcda_deploy import OmcdaError, export
                import omcda_deploy.export.graph as graph
                try:
                    export("nowhere", "bundle")
                except OmcdaError as error:
                    print(error)
                print(graph.__name__)
                sys.exit()
            assert os.wait()[1] == 0
    """
    assert run(code).splitlines() == 2 * [
        "nowhere is not a run folder: it has no config.json. Make one with  omcda-deploy train",
        "omcda_deploy.export.graph",
    ]


def test_a_notebook_goes_from_a_simulator_to_an_exported_team(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omcda_deploy import (
        BehaviorTeam,
        LocalTeam,
        collect,
        evaluate,
        export,
        make_environment,
        read_bundle,
        read_dataset,
        replay,
        train,
        write_dataset,
    )
    from omcda_deploy.envs import toy

    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chain.hdf5"
    summary = collect(
        "toy/chain",
        toy.behavior_team("toy/chain"),
        path,
        transitions=2000,
        seed=0,
        behavior="behavior",
        workers=0,
    )
    dataset = read_dataset(path)
    assert summary["digest"] == dataset.digest
    options: dict[str, Any] = {"settings": {"hidden": 8, "batch_size": 16}, "behavior": {"steps": 20}}
    first = train(dataset, "omcda", tmp_path / "run", steps=20, **options)
    second = train(str(path), "omcda", str(tmp_path / "again"), steps=20, **options)
    bundle = export(first, tmp_path / "bundle")
    assert export(second, str(tmp_path / "copy")).manifest["files"] == bundle.manifest["files"]
    team = LocalTeam(read_bundle(tmp_path / "bundle"))
    evaluation = evaluate(team, "toy/chain", episodes=3)
    assert evaluation.returns.shape == (3,)
    assert replay(BehaviorTeam(bundle), dataset, episodes=2).steps > 0
    episodes = [dataset.episode(i) for i in range(len(dataset.episode_length))]
    write_dataset(tmp_path / "copy.hdf5", dataset.spec, episodes)
    copy = read_dataset(tmp_path / "copy.hdf5")
    assert np.array_equal(copy.observations, dataset.observations)
    environment = make_environment("toy/chain")
    assert environment.spec == dataset.spec
