"""Videos of played episodes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs.vector import BatchedEnvironment, VectorStep
from omcda_deploy.errors import ConfigError, MissingExtraError, OmcdaError
from omcda_deploy.files import atomic, require_writable
from omcda_deploy.spec import TeamSpec

log = logging.getLogger(__name__)

_QUIET = {"ffmpeg_log_level": "fatal"}
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

    ``stride`` is the number of control steps per frame; frames go to the encoder ``writer`` as they come, until it
    fails: ``failure`` is its error.
    """

    def __init__(self, environment: BatchedEnvironment, writer: Any, stride: int) -> None:
        self.spec: TeamSpec = environment.spec
        self.num_envs = environment.num_envs
        self._environment, self._writer, self._stride = environment, writer, stride
        self._episodes = self._steps = 0
        self.frames = 0
        self.failure: Exception | None = None

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
        if self._episodes == 1 and self._steps % self._stride == 0 and self.failure is None:
            with rendering(self.spec.task):
                frame = self._environment.render(0)
            try:
                self._writer.append_data(frame)
                self.frames += 1
            except Exception as error:  # of a program of its own, which fails in many ways
                self.failure = error


@contextmanager
def filming(environment: BatchedEnvironment, path: Path) -> Iterator[BatchedEnvironment]:
    """Film to ``path`` in real time, at 30 frames per second or fewer; yields the environment to play.

    A block that fails leaves no file, and a video that fails leaves none either: a warning says why, and the block
    goes on. Raises :class:`MissingExtraError` without an encoder.
    """
    try:
        import imageio

        ffmpeg = import_module("imageio_ffmpeg")  # the encoder, which imageio misses only at the first frame
    except ImportError as error:
        raise MissingExtraError("imageio with imageio-ffmpeg", "mujoco") from error
    rate = environment.spec.control_rate
    stride = math.ceil(rate / _MAX_FRAME_RATE)
    with suppress(_VideoError), atomic(path) as temporary:
        writer = imageio.get_writer(
            temporary, format="FFMPEG", fps=rate / stride, codec="libx264", macro_block_size=2, **_QUIET
        )
        stage = FilmedEnvironment(environment, writer, stride)
        try:
            yield stage
        except BaseException:
            with suppress(Exception):  # what the block raised is the one to be seen
                writer.close()
            raise
        try:
            writer.close()
            if stage.failure is not None:
                raise stage.failure
            if (frames := ffmpeg.count_frames_and_secs(str(temporary))[0]) != stage.frames:
                raise OSError(f"{frames} of {stage.frames} frames arrived")
        except Exception as error:
            log.warning("the video %s was not written, as its encoder failed: %s", path, _reason(path, error))
            raise _VideoError from error


def _reason(path: Path, error: Exception) -> str:
    """Say why the encoder failed: a pipe that it closed tells less than the place it wrote to."""
    try:
        require_writable(path)
    except ConfigError as refused:
        return str(refused)
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class _VideoError(Exception):
    """A video failed; nobody but :func:`filming` sees it."""
