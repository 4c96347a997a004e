"""What lets strangers look at a server: ``grpc.health.v1`` and server reflection (v1 and v1alpha)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.serve.handlers import Context, Traffic

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
FILES: tuple[FileDescriptor, ...] = (
    policy_pb2.DESCRIPTOR,
    oip.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)


class Health(health_aio.HealthServicer):  # type: ignore[misc]
    """The stock servicer; its watchers do not hold up a drain."""

    def __init__(self, services: Iterable[str], traffic: Traffic) -> None:
        super().__init__()
        self._server_status.update(dict.fromkeys(services, health_pb2.HealthCheckResponse.SERVING))
        self._traffic = traffic

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802, the service's name
        self._traffic.wait(context)
        try:
            await super().Watch(request, context)
        finally:
            self._traffic.waited(context)


def add_health(server: grpc.aio.Server, services: Iterable[str], traffic: Traffic) -> Health:
    health = Health(services, traffic)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return health


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Reflection over one pool: the messages of OIP are in none that protobuf knows of by itself.

    v1 has the messages of v1alpha under another package name, so one servicer answers both.
    """
    pool = descriptor_pool.DescriptorPool()
    for file in FILES:
        pool.AddSerializedFile(file.serialized_pb)
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION), pool=pool)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in REFLECTION:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),)
        )
