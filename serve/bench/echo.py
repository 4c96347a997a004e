"""A bare grpc.aio server, which answers every request with a fixed number of zero bytes.

It costs what gRPC itself costs; :mod:`omcda_deploy.serve.bench.steps` compares servers with it. It has the poller
and the event loop of this package's servers, or the defaults of gRPC and asyncio. Run as
``python -m omcda_deploy.serve.bench.echo [--defaults] --unary PATH BYTES --stream PATH BYTES``.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omcda_deploy.serve import event_loop

if TYPE_CHECKING:
    import grpc


def unary(size: int) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that answers one call with ``size`` bytes."""
    import grpc

    answer = bytes(size)

    async def handle(data: bytes, context: Any) -> bytes:
        return answer

    return grpc.unary_unary_rpc_method_handler(handle)


def stream(size: int) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that answers every message of a stream with ``size`` bytes."""
    import grpc

    answer = bytes(size)

    async def handle(_: object, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(answer)

    return grpc.stream_stream_rpc_method_handler(handle)


async def serve(handlers: Sequence[tuple[str, grpc.RpcMethodHandler[Any, Any]]]) -> None:
    """Serve ``handlers``, by path ``/service/method``, on a free port of this machine until SIGTERM."""
    import grpc

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    for path, handler in handlers:
        service, _, method = path.strip("/").partition("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"serving echo on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await stop.wait()
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m omcda_deploy.serve.bench.echo")
    parser.add_argument("--defaults", action="store_true", help="keep the defaults of gRPC and asyncio")
    for kind in ("--unary", "--stream"):
        parser.add_argument(kind, nargs=2, action="append", default=[], metavar=("PATH", "BYTES"))
    options = parser.parse_args()
    if not options.defaults:
        event_loop.choose_poller()  # before gRPC is imported
    handlers = [(path, unary(int(size))) for path, size in options.unary]
    handlers += [(path, stream(int(size))) for path, size in options.stream]
    event_loop.run(serve(handlers))


if __name__ == "__main__":
    main()
