"""TLS, client certificates and bearer tokens.

Tokens are lines of a file, which is read again when it changes, so that they can be rotated without a restart: add
the new token, move the clients, remove the old one. Health checks need no token, as probes have none.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from omcda_deploy.errors import ConfigError

RELOAD_S = 1.0
OPEN_SERVICES = ("/grpc.health.v1.Health/",)
DENIED = "expected the metadata  authorization: Bearer TOKEN  with a token of this server"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """Names of PEM files. With ``client_ca`` every client must have a certificate of this authority (mTLS).

    The files are read again when they change; new connections then use the new contents.
    """

    certificate: str
    key: str
    client_ca: str | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one port. Raises :class:`ConfigError` for a file that cannot be read."""
        current = self._read()
        trouble = _Trouble()

        def fetch() -> Any:
            """Return the files' configuration at a handshake if it has changed, otherwise None."""
            nonlocal current
            try:
                files = self._read()
            except ConfigError as error:  # half-written, or missing for a moment: the last contents stay
                trouble.tell(error)
                return None
            trouble.end()
            if files == current:
                return None
            current = files
            log.info("%s was read again", self.certificate)
            return _configuration(*files)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(*current), fetch, self.client_ca is not None
        )

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        authority = None if self.client_ca is None else _read("tls.client_ca", self.client_ca)
        return _read("tls.key", self.key), _read("tls.certificate", self.certificate), authority


def _configuration(key: bytes, certificate: bytes, authority: bytes | None) -> Any:
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


class _Trouble:
    """Warns of a file once, until it can be read again: it may be wanted hundreds of times a second."""

    def __init__(self) -> None:
        self._told = ""

    def tell(self, error: ConfigError) -> None:
        if str(error) != self._told:
            self._told = str(error)
            log.warning("%s; the last contents stay", error)

    def end(self) -> None:
        self._told = ""


class Tokens:
    """The tokens of a file. Raises :class:`ConfigError` if it has none at the start."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._checked = time.monotonic()
        self._stamp = self._file_stamp()
        self._digests = self._load()
        self._trouble = _Trouble()

    def admit(self, authorization: str) -> bool:
        """Return whether the value of an ``authorization`` header is ``Bearer`` and one of the tokens."""
        self._reload()
        scheme, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        # All tokens are compared, each in constant time, so that the time reveals neither a token nor its place.
        matches = [hmac.compare_digest(digest, token_digest) for token_digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def _load(self) -> list[bytes]:
        try:
            text = _read("access.token_file", self._file).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"access.token_file: expected {self._file} in UTF-8, got a byte {error.object[error.start]:#04x}"
            ) from error
        lines = [line.strip() for line in text.splitlines()]
        tokens = [line for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise ConfigError(f"access.token_file: expected a token per line in {self._file}, found none")
        return [hashlib.sha256(token.encode()).digest() for token in tokens]

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._checked < RELOAD_S:
            return
        self._checked = now
        try:
            if (stamp := self._file_stamp()) != self._stamp:
                self._digests, self._stamp = self._load(), stamp
                log.info("%s was read again: %d tokens", self._file, len(self._digests))
            self._trouble.end()
        except ConfigError as error:  # half-written, or missing for a moment: the last tokens stay
            self._trouble.tell(error)

    def _file_stamp(self) -> tuple[int, int]:
        """Return the file's modification time in ns and its size."""
        try:
            status = self._file.stat()
        except OSError as error:
            raise ConfigError(f"access.token_file: {self._file} cannot be read: {error.strerror}") from error
        return status.st_mtime_ns, status.st_size


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without a token, before any of their messages is read."""

    def __init__(self, tokens: Tokens, denied: Callable[[], None]) -> None:
        """``denied``: called for each call that is refused."""
        self._tokens, self._denied = tokens, denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_SERVICES):
            return handler
        metadata = {key: value for key, value in handler_call_details.invocation_metadata or ()}
        value = metadata.get("authorization", "")
        if self._tokens.admit(value if isinstance(value, str) else ""):
            return handler
        self._denied()
        return _DENIAL


async def _refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)


# A stream handler for every method: a unary one would wait for a message, and keep its place among the calls.
_DENIAL: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse)


def _read(entry: str, file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{entry}: {file} cannot be read: {error.strerror}") from error
