"""Choice of gRPC's poller, its own messages, and the event loop.

Waiting for the network costs more than a small policy's answer. gRPC's newer event engine passes every message
through threads of its own before asyncio's loop sees it; the older poller wakes one thread. uvloop saves more, but
only with the older poller: with the event engine it answers single calls more slowly than asyncio's own loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from importlib.util import find_spec
from typing import Any

_EXPERIMENTS = "GRPC_EXPERIMENTS"
_POLLER = "-event_engine_listener"


def choose_poller(*, json_lines: bool = False) -> None:
    """Choose the older poller, unless the environment chooses. Call it before grpc is imported.

    ``json_lines``: also turn gRPC's own messages on stderr off, as they are text.
    """
    os.environ.setdefault(_EXPERIMENTS, _POLLER)
    if json_lines:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run as ``asyncio.run``, on uvloop if :func:`choose_poller` has chosen and uvloop is installed."""
    factory = None
    if os.environ.get(_EXPERIMENTS) == _POLLER and find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)
