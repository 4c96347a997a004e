"""TLS, client certificates and bearer tokens.

Tokens are lines of a file, which is read again when it changes, so that they can be rotated without a restart: add
the new token, move the clients, remove the old one. Health checks need no token, as probes have none. Operators may
have tokens of their own, which step no robot, and by whose names the audit log knows them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from omcda_deploy.errors import ConfigError
from omcda_deploy.followed import FollowedFile, Trouble
from omcda_deploy.pem import require_authority, require_pair
from omcda_deploy.serve.places import Context

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
        """Return credentials for one port. Raises :class:`ConfigError` for files that are not what they say."""
        current = self._read()
        self._require_fitting()
        trouble = Trouble()

        def fetch() -> Any:
            """Return the files' configuration at a handshake if it has changed, otherwise None."""
            nonlocal current
            try:
                if (files := self._read()) != current:
                    self._require_fitting()
            except ConfigError as error:  # half-written, or of two pairs for a moment: the last contents stay
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

    def _require_fitting(self) -> None:
        """Check that the files are what they say: not at every handshake, but where they are new."""
        try:
            require_pair(Path(self.certificate), Path(self.key))
            if self.client_ca is not None:
                require_authority(Path(self.client_ca))
        except ConfigError as error:
            raise ConfigError(f"tls: {error}") from error


def _configuration(key: bytes, certificate: bytes, authority: bytes | None) -> Any:
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


class Tokens:
    """The tokens of a file, one per line, each with the name of its holder if there is one behind it.

    Raises :class:`ConfigError` if it has none at the start. ``entry``: of the configuration, for messages.
    """

    def __init__(self, file: Path, entry: str = "access.token_file") -> None:
        self._entry = entry
        self._file = FollowedFile(file, self._read)

    def holder(self, authorization: str) -> str | None:
        """Return the name of the one whose token an ``authorization`` header has; None if it has no valid one."""
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip())
        # All tokens are compared, each in constant time, so that the time reveals neither a token nor its place.
        names = [name for known, name in self._file.contents if hmac.compare_digest(digest, known)]
        return names[0] if names and scheme.lower() == "bearer" else None

    def _read(self, file: Path) -> list[tuple[bytes, str]]:
        try:
            text = _read(self._entry, file).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self._entry}: expected {file} in UTF-8, got a byte {error.object[error.start]:#04x}"
            ) from error
        lines = [line.split(maxsplit=1) for line in text.splitlines()]
        tokens = [words for words in lines if words and not words[0].startswith("#")]
        if not tokens:
            raise ConfigError(f"{self._entry}: expected a token per line in {file}, found none")
        digests = [_digest(token) for token, *_ in tokens]
        return [
            (digest, words[1].strip() if len(words) > 1 else f"token {digest.hex()[:8]}")
            for digest, words in zip(digests, tokens, strict=True)
        ]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


@dataclass
class Access:
    """Tokens that may call the ports for steps, and those for operators; None where everybody may."""

    steps: Tokens | None = None
    operators: Tokens | None = None

    @classmethod
    def of(cls, token_file: Path | None, admin_token_file: Path | None) -> Access:
        """Read the files. Without one for operators, the tokens for steps are theirs too."""
        steps = None if token_file is None else Tokens(token_file)
        if admin_token_file is None:
            return cls(steps, steps)
        return cls(steps, Tokens(admin_token_file, "access.admin_token_file"))

    def replace(self, other: Access) -> None:
        """Take over the tokens of another one."""
        self.steps, self.operators = other.steps, other.operators

    def operator(self, context: Context) -> dict[str, str]:
        """Return who calls an admin port: their token's name as ``operator``, and that in their ``certificate``."""
        metadata = {key: value for key, value in context.invocation_metadata() or ()}
        authorization = str(metadata.get("authorization", ""))
        holder = None if self.operators is None else self.operators.holder(authorization)
        certificate = context.auth_context().get("x509_common_name", ())
        known = {"operator": holder, "certificate": b" ".join(certificate).decode(errors="replace")}
        return {name: value for name, value in known.items() if value}


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without a token, before any of their messages is read."""

    def __init__(self, tokens: Callable[[], Tokens | None], denied: Callable[[str, Context], object]) -> None:
        """``tokens``: those that are valid now. ``denied``: called with method and context of each refused call."""
        self._tokens, self._denied = tokens, denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method, tokens = handler_call_details.method, self._tokens()
        if handler is None or tokens is None or method.startswith(OPEN_SERVICES):
            return handler
        metadata = {key: value for key, value in handler_call_details.invocation_metadata or ()}
        value = metadata.get("authorization", "")
        if tokens.holder(value if isinstance(value, str) else "") is not None:
            return handler

        async def refuse(_: Any, context: Context) -> None:
            self._denied(method, context)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)

        # A stream handler for every method: a unary one would wait for a message, and keep its place meanwhile.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _read(entry: str, file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{entry}: {file} cannot be read: {error.strerror}") from error
