"""Serve one SMAC environment over two pipes. The interpreter that SMAC is installed in runs this file:

    python -I smac_host.py READ WRITE --map-name 5m_vs_6m [--seed N] [--factory MODULE:CALLABLE] [--path FOLDER]

    python -I smac_host.py --versions

The program needs Python 3.8, its standard library and numpy, and imports nothing of omcda-deploy. READ and WRITE
are inherited file descriptors; standard output is left to StarCraft II, which prints there. The program ends when
READ does.

A frame is a header (magic, length of the JSON, length of the data), a JSON object and raw little-endian data:

| request                       | answer                                               | data of the answer |
|-------------------------------|------------------------------------------------------|--------------------|
| (the first answer)            | ``env_info``                                         | none               |
| ``reset``                     | nothing                                              | a step's arrays    |
|                               | ``crashed``, where StarCraft II did                  | none               |
| ``step``, data: int64 [N]     | ``reward``, ``terminated``, ``won``                  | a step's arrays    |
|                               | ``crashed``, where StarCraft II did                  | none               |
|                               | ``refused``, SMAC's words on illegal actions         | none               |
| any                           | ``error``, any other exception, after which it ends  | none               |

A step's arrays are the observations float32 [N, O], the state float32 [S] and the available actions uint8 [N, A],
joined. ``--versions`` prints the versions of SMAC's packages and of StarCraft II as JSON, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import select
import struct
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

HEADER = struct.Struct("<4sII")
MAGIC = b"SMC1"
MAX_BYTES = 1 << 24  # largest frame that is read; the arrays of any map are far smaller
STEP_MUL = 8  # game loops per step
SIZES = ("n_agents", "obs_shape", "state_shape", "n_actions", "episode_limit")
PACKAGES = ("smac", "pysc2", "s2clientprotocol")
METHODS = ("get_env_info", "reset", "step", "get_obs", "get_state", "get_avail_actions", "close")


def write_frame(descriptor: int, control: dict[str, Any], data: bytes = b"") -> None:
    """Write one frame. Raises BrokenPipeError when nobody reads."""
    text = json.dumps(control).encode()
    rest = memoryview(HEADER.pack(MAGIC, len(text), len(data)) + text + data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_frame(descriptor: int, seconds: float | None = None) -> tuple[dict[str, Any], bytes]:
    """Read one frame. Raises EOFError, TimeoutError after ``seconds``, and ValueError for other bytes."""
    end = None if seconds is None else time.monotonic() + seconds
    magic, text, data = HEADER.unpack(_read(descriptor, HEADER.size, end))
    if magic != MAGIC or text + data > MAX_BYTES:
        raise ValueError(f"expected a frame, got {magic!r} with {text + data} bytes")
    control = json.loads(_read(descriptor, text, end))
    if not isinstance(control, dict):
        raise ValueError(f"expected a JSON object, got {control!r}")
    return control, _read(descriptor, data, end)


def _read(descriptor: int, size: int, end: float | None) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    parts = []
    while size:
        if not poll.poll(None if end is None else max(0.0, end - time.monotonic()) * 1e3):
            raise TimeoutError("no answer in time")
        part = os.read(descriptor, size)
        if not part:
            raise EOFError("the other side ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def make(factory: str, path: str | None, **keywords: Any) -> Any:
    """Call ``factory`` with SMAC's ``keywords``; ``path`` is searched after the interpreter's own folders.

    Raises TypeError where the result lacks one of SMAC's methods.
    """
    if path is not None:
        sys.path.append(path)
    module, _, name = factory.partition(":")
    environment = getattr(importlib.import_module(module), name)(**keywords)
    missing = [method for method in METHODS if not callable(getattr(environment, method, None))]
    if missing:
        raise TypeError(
            f"{factory} made a {type(environment).__name__}, which lacks SMAC's {', '.join(missing)}"
        )
    return environment


class Host:
    """Answers to requests, by the environment's methods."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        info = environment.get_env_info()
        self.env_info = {name: int(info[name]) for name in SIZES}

    def answer(self, control: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Run one request; the arguments and the result are the JSON object and the data of a frame."""
        if control.get("command") == "reset":
            return self._reset()
        if control.get("command") == "step":
            return self._step(data)
        raise ValueError(f"expected the command reset or step, got {control!r}")

    def _reset(self) -> tuple[dict[str, Any], bytes]:
        # Where StarCraft II crashes in a reset, SMAC starts another and goes on with the last episode's units.
        restarts = getattr(self._environment, "force_restarts", 0)
        self._environment.reset()
        if getattr(self._environment, "force_restarts", 0) != restarts:
            return {"crashed": True}, b""
        return {}, self._step_arrays()

    def _step(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        actions = np.frombuffer(data, "<i8").tolist()
        if len(actions) != self.env_info["n_agents"]:
            raise ValueError(f"expected {self.env_info['n_agents']} actions, got {len(actions)}")
        try:
            reward, terminated, info = self._environment.step(actions)
        except AssertionError as error:
            return {"refused": str(error)}, b""
        if not info:
            return {"crashed": True}, b""
        outcome = {
            "reward": float(reward),
            "terminated": bool(terminated),
            "won": bool(info["battle_won"]),
        }
        return outcome, self._step_arrays()

    def _step_arrays(self) -> bytes:
        sizes = self.env_info
        agents = sizes["n_agents"]
        parts = []
        for name, values, kind, shape in (
            ("get_obs()", self._environment.get_obs(), "<f4", (agents, sizes["obs_shape"])),
            ("get_state()", self._environment.get_state(), "<f4", (sizes["state_shape"],)),
            (
                "get_avail_actions()",
                self._environment.get_avail_actions(),
                "u1",
                (agents, sizes["n_actions"]),
            ),
        ):
            array = np.asarray(values, kind)
            if array.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, as get_env_info() says, got {array.shape}")
            parts.append(array.tobytes())
        return b"".join(parts)


def versions() -> dict[str, str]:
    """Versions of the installed packages of SMAC, and of the newest StarCraft II, which PySC2 starts."""
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    game = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
    builds = [folder.name[4:] for folder in game.glob("Versions/Base*")]
    if numbers := [int(build) for build in builds if build.isdigit()]:
        installed["StarCraftII"] = f"build {max(numbers)}"
    return installed


def main() -> None:
    """Run the program; see the module's docstring."""
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return
    parser = argparse.ArgumentParser(description="Serve one SMAC environment over two pipes.")
    parser.add_argument("read", type=int)
    parser.add_argument("write", type=int)
    parser.add_argument("--map-name", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--factory", default="smac.env:StarCraft2Env")
    parser.add_argument("--path")
    options = parser.parse_args()
    for descriptor in (options.read, options.write):
        os.set_inheritable(descriptor, False)  # otherwise StarCraft II keeps the pipes open when we end
    environment = None
    try:
        environment = make(
            options.factory,
            options.path,
            map_name=options.map_name,
            seed=options.seed,
            difficulty="7",
            step_mul=STEP_MUL,
        )
        host = Host(environment)
        write_frame(options.write, {"env_info": host.env_info})
        while True:
            write_frame(options.write, *host.answer(*read_frame(options.read)))
    except (EOFError, BrokenPipeError):
        pass  # the other side has ended or closed its pipes
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):
            write_frame(options.write, {"error": f"{type(error).__name__}: {error}"})
    finally:
        if environment is not None:
            environment.close()


if __name__ == "__main__":
    main()
