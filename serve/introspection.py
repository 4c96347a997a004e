"""Health and reflection services: ``grpc.health.v1``, and server reflection v1 and v1alpha."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from operator import methodcaller
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.serve.handlers import CallTracker, Request, parse, placed
from omcda_deploy.serve.places import SENDING, WATCHING, Context, Place

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_SERIALIZE = methodcaller("SerializeToString")
FILES: tuple[FileDescriptor, ...] = (
    policy_pb2.DESCRIPTOR,
    oip.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)


def _reflection_v1() -> bytes:
    """Return the serialised file of reflection v1: that of v1alpha, the only one in its package, renamed."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name, file.package = file.name.replace("v1alpha", "v1"), file.package.replace("v1alpha", "v1")
    for field in (field for message in file.message_type for field in message.field if field.type_name):
        field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for method in (method for service in file.service for method in service.method):
        method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
        method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    return file.SerializeToString()


class Health(health_aio.HealthServicer):  # type: ignore[misc]
    """The stock health servicer with two changes.

    Requests are parsed here, and callers have places, so that they neither add up nor delay the end of a server.
    """

    def __init__(self, services: Iterable[str], tracker: CallTracker) -> None:
        super().__init__()
        self._server_status.update(dict.fromkeys(services, health_pb2.HealthCheckResponse.SERVING))
        self._places = tracker.introspection

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            HEALTH,
            {
                "Check": grpc.stream_unary_rpc_method_handler(
                    placed(self._places, self._check), response_serializer=_SERIALIZE
                ),
                "Watch": grpc.stream_stream_rpc_method_handler(
                    placed(self._places, self._watch), response_serializer=_SERIALIZE
                ),
            },
        )

    async def _check(self, context: Context, place: Place) -> health_pb2.HealthCheckResponse:
        return await self.Check(await self._request(context), context)

    async def _watch(self, context: Context, place: Place) -> None:
        request = await self._request(context)
        place.enter(WATCHING)
        await self.Watch(request, context)

    async def _request(self, context: Context) -> health_pb2.HealthCheckRequest:
        """Read a request; other bytes end the call with INVALID_ARGUMENT, where gRPC would answer UNKNOWN."""
        data = await context.read()
        return parse(health_pb2.HealthCheckRequest, b"" if data is grpc.aio.EOF else data)


async def _one(request: Request) -> AsyncIterator[Request]:
    yield request


def add_reflection(server: grpc.aio.Server, services: Iterable[str], tracker: CallTracker) -> None:
    """Add server reflection for ``services``, from a pool of its own.

    The messages of the Open Inference Protocol are not in protobuf's default pool. v1 has the messages of v1alpha
    under another package name, so one servicer answers both.
    """
    pool = descriptor_pool.DescriptorPool()
    for data in (*(file.serialized_pb for file in FILES), _reflection_v1()):
        pool.AddSerializedFile(data)
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION), pool=pool)

    async def reflect(context: Context, place: Place) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            place.enter(SENDING)
            request = parse(reflection_pb2.ServerReflectionRequest, data)
            async for response in servicer.ServerReflectionInfo(_one(request), context):
                await context.write(response)
            place.enter(WATCHING)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        placed(tracker.introspection, reflect), response_serializer=_SERIALIZE
    )
    for service in REFLECTION:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),)
        )
