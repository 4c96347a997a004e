"""A server as one writes it from the documentation of gRPC and onnxruntime: no checks, guard, metrics or limits.

:mod:`omcda_deploy.serve.bench.steps` compares servers with it. Run as
``python -m omcda_deploy.serve.bench.plain MODEL.onnx``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc
import numpy as np
import onnxruntime

from omcda_deploy.protos import policy_pb2, policy_pb2_grpc

DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class PlainService(policy_pb2_grpc.PolicyServiceServicer):
    """Answers ``Act`` with the outputs of one model on one thread."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [entry.name for entry in self._session.get_outputs()]

    async def Act(self, request: Any, context: Any) -> Any:  # noqa: N802
        feeds = {}
        for entry in self._session.get_inputs():
            data = np.frombuffer(getattr(request, entry.name), DTYPES[entry.type])
            shape = (request.batch, entry.shape[1])
            feeds[entry.name] = data.reshape(shape) if data.size else np.zeros(shape, DTYPES[entry.type])
        outputs = self._session.run(self._outputs, feeds)
        return policy_pb2.ActResponse(
            step_id=request.step_id,
            batch=request.batch,
            **{name: values.tobytes() for name, values in zip(self._outputs, outputs, strict=True)},
        )


async def serve(path: str) -> None:
    """Serve the model at ``path`` on a free port of this machine until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server()
    add: Any = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    add(PlainService(path), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"serving a model on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
