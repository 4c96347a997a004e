"""Videos of played episodes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs.vector import BatchedEnvironment, VectorStep
from omcda_deploy.errors import ConfigError, MissingExtraError, OmcdaError
from omcda_deploy.files import atomic
from omcda_deploy.spec import TeamSpec

_MAX_FRAME_RATE = 30.0  # frames per second


def require_video(path: Path) -> None:
    """Raise :class:`ConfigError` unless ``path`` names an .mp4 file in a folder that can be written."""
    if path.suffix != ".mp4" or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"video: expected an .mp4 file in a folder that can be written, got {path}")


@contextmanager
def rendering(task: str) -> Iterator[None]:
    """Raise :class:`ConfigError` that says what to do where MuJoCo finds no GL, on import or at a frame."""
    try:
        yield
    except OmcdaError:
        raise
    except Exception as error:  # each GL platform fails in its own way, down to AttributeError
        reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise ConfigError(
            f"video: {task} cannot be rendered here with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({reason}). "
            "Install EGL (Debian: apt-get install libegl1 libgl1-mesa-dri), or set MUJOCO_GL=osmesa with "
            "libosmesa6 installed, or leave the video out"
        ) from error


class FilmedEnvironment:
    """A :class:`BatchedEnvironment` that films the first episode of its first environment.

    ``stride`` is the number of control steps per frame; frames go to the encoder ``writer`` as they come.
    """

    def __init__(self, environment: BatchedEnvironment, writer: Any, stride: int) -> None:
        self.spec: TeamSpec = environment.spec
        self.num_envs = environment.num_envs
        self._environment, self._writer, self._stride = environment, writer, stride
        self._episodes = self._steps = 0

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        step = self._environment.reset(seeds)
        if 0 in seeds:
            self._episodes += 1
            self._film()
        return step

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        step = self._environment.step(actions, active)
        if active is None or active[0]:
            self._steps += 1
            self._film()
        return step

    def render(self, index: int) -> NDArray[np.uint8]:
        return self._environment.render(index)

    def close(self) -> None:
        self._environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _film(self) -> None:
        if self._episodes == 1 and self._steps % self._stride == 0:
            with rendering(self.spec.task):
                frame = self._environment.render(0)
            self._writer.append_data(frame)


@contextmanager
def filming(environment: BatchedEnvironment, path: Path) -> Iterator[BatchedEnvironment]:
    """Film to ``path`` in real time, at 30 frames per second or fewer; yields the environment to play.

    A block that fails leaves no file. Raises :class:`MissingExtraError` without an encoder.
    """
    try:
        import imageio

        import_module("imageio_ffmpeg")  # the encoder, which imageio misses only at the first frame
    except ImportError as error:
        raise MissingExtraError("imageio with imageio-ffmpeg", "mujoco") from error
    rate = environment.spec.control_rate
    stride = math.ceil(rate / _MAX_FRAME_RATE)
    with atomic(path) as temporary:
        writer = imageio.get_writer(
            temporary, format="FFMPEG", fps=rate / stride, codec="libx264", macro_block_size=2
        )
        try:
            yield FilmedEnvironment(environment, writer, stride)
        finally:
            writer.close()
