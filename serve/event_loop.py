"""How a server process waits for the network, which costs more than a small policy's answer.

gRPC's newer event engine hands every message through threads of its own before asyncio's loop sees it; the poller
that it replaces wakes one thread. uvloop saves more, but only there: above the event engine it answers single calls
more slowly than asyncio's own loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from importlib.util import find_spec
from typing import Any

_EXPERIMENTS = "GRPC_EXPERIMENTS"
_POLLER = "-event_engine_listener"


def choose_poller() -> None:
    """Choose gRPC's poller, before grpc is imported, unless the process's environment chooses."""
    os.environ.setdefault(_EXPERIMENTS, _POLLER)


def run(main: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run``, on uvloop where :func:`choose_poller` has chosen and there is one."""
    factory = None
    if os.environ.get(_EXPERIMENTS) == _POLLER and find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)
