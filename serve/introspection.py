"""Health and reflection services: ``grpc.health.v1``, and server reflection v1 and v1alpha."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from operator import methodcaller
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.serve.handlers import CallTracker, Context, Request, abort, parse

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_SERIALIZE = methodcaller("SerializeToString")
FILES: tuple[FileDescriptor, ...] = (
    policy_pb2.DESCRIPTOR,
    oip.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)


class Health(health_aio.HealthServicer):  # type: ignore[misc]
    """The stock health servicer with two changes.

    Requests are parsed here, and watchers do not delay the end of a server.
    """

    def __init__(self, services: Iterable[str], tracker: CallTracker) -> None:
        super().__init__()
        self._server_status.update(dict.fromkeys(services, health_pb2.HealthCheckResponse.SERVING))
        self._tracker = tracker

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            HEALTH,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, response_serializer=_SERIALIZE),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=_SERIALIZE),
            },
        )

    async def _check(self, data: bytes, context: Context) -> health_pb2.HealthCheckResponse:
        return await self.Check(await _parse_or_abort(health_pb2.HealthCheckRequest, data, context), context)

    async def _watch(self, data: bytes, context: Context) -> None:
        request = await _parse_or_abort(health_pb2.HealthCheckRequest, data, context)
        self._tracker.begin_wait(context)
        try:
            await self.Watch(request, context)
        finally:
            self._tracker.end_wait(context)


async def _parse_or_abort(kind: type[Request], data: bytes, context: Context) -> Request:
    """Parse a request; other bytes end the call with INVALID_ARGUMENT, where gRPC would answer UNKNOWN."""
    try:
        return parse(kind, data)
    except DecodeError as error:
        await abort(context, error)
        raise  # not reached: abort raises


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Add server reflection for ``services``, from a pool of its own.

    The messages of the Open Inference Protocol are not in protobuf's default pool. v1 has the messages of v1alpha
    under another package name, so one servicer answers both.
    """
    pool = descriptor_pool.DescriptorPool()
    for file in FILES:
        pool.AddSerializedFile(file.serialized_pb)
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION), pool=pool)

    async def reflect(
        data: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            async for part in data:
                yield await _parse_or_abort(reflection_pb2.ServerReflectionRequest, part, context)

        async for response in servicer.ServerReflectionInfo(requests(), context):
            yield response

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        reflect, response_serializer=_SERIALIZE
    )
    for service in REFLECTION:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),)
        )
