"""Channels to policy servers: addresses, TLS and tokens.

A credentials file names a client's certificate and token, and the authority that it trusts::

    ca = "ca.pem"                  # authority of the servers' certificates; default: plaintext
    certificate = "robot.pem"      # for servers that require one (mTLS)
    key = "robot.key"
    server_name = "localhost"      # name in the servers' certificates, if it is not the address
    token_file = "token"           # its first word is sent as bearer token, and read again when it changes

Names of files are relative to the folder of the credentials file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np

from omcda_deploy.errors import ConfigError, EndpointError, UnknownNameError
from omcda_deploy.files import read_toml
from omcda_deploy.followed import FollowedFile
from omcda_deploy.pem import require_authority, require_pair

_SCHEMES, _UNCHECKED = ("dns", "ipv4", "ipv6"), ("unix", "unix-abstract", "vsock", "xds")
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # which is the time for one attempt, too: links may be slow
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class FileToken:
    """Metadata of calls with the first word of a file, as it is when a call begins."""

    def __init__(self, file: Path) -> None:
        """Raises :class:`ConfigError` if it has none now; later the last one stays then."""
        self._file = FollowedFile(file, _read_token)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(_bearer(self._file.contents))

    def __len__(self) -> int:
        return 1


# Names and values, sent with a call: a tuple of pairs or a FileToken, which gRPC takes and its stubs do not know.
Metadata: TypeAlias = Any


@dataclass(frozen=True)
class Credentials:
    """Contents of the files of a credentials file (:func:`read_credentials`).

    ``token_file``: the file that the token is read from again when it changes; its token is sent, not ``token``.
    """

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None
    token: str | None = None
    token_file: Path | None = None

    @property
    def metadata(self) -> Metadata:
        """The metadata of every call. Raises :class:`ConfigError` if ``token_file`` has no token."""
        if self.token_file is not None:
            return FileToken(self.token_file)
        return () if self.token is None else _bearer(self.token)


def read_credentials(path: Path) -> Credentials:
    """Read a credentials file and the files that it names.

    Raises :class:`ConfigError` for a file that cannot be read, or is not what its entry says, and
    :class:`UnknownNameError` for another entry.
    """
    values = read_toml(path, "a credentials file")
    entries = [field.name for field in fields(Credentials) if field.name != "token"]
    for name, value in values.items():
        if name not in entries:
            raise UnknownNameError(f"entry of {path}", name, entries)
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {name}: expected a string, got {value!r}")
    if ("certificate" in values) != ("key" in values):
        raise ConfigError(f"{path}: expected certificate and key, or neither, got {', '.join(values)}")
    files: dict[str, Any] = {
        name: _read(f"{path}: {name}", path.parent / values[name])
        for name in ("ca", "certificate", "key")
        if name in values
    }
    try:
        if "ca" in values:
            require_authority(path.parent / values["ca"])
        if "key" in values:
            require_pair(path.parent / values["certificate"], path.parent / values["key"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    token_file = path.parent / values["token_file"] if "token_file" in values else None
    if token_file is not None:
        try:
            _read_token(token_file)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return Credentials(**files, server_name=values.get("server_name"), token_file=token_file)


def _read_token(file: Path) -> str:
    try:
        words = _read("token_file", file).decode().split()
    except UnicodeDecodeError as error:
        raise ConfigError(f"token_file: expected {file} in UTF-8") from error
    if not words:
        raise ConfigError(f"token_file: expected a token in {file}, found none")
    return words[0]


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def require_endpoint(endpoint: str) -> None:
    """Check an address, of which gRPC takes wrong ones without a word: port 99999 is 34463 to it, and none is 443.

    Raises :class:`EndpointError`. Sockets of Unix (``unix:…``) and other schemes of gRPC are not looked at.
    """
    scheme, colon, rest = str(endpoint).partition(":")
    if scheme in _UNCHECKED:
        return
    address = rest.rpartition("/")[2] if colon and scheme in _SCHEMES else str(endpoint)
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host == f"[{bare}]"
    if not (port.isdecimal() and 1 <= int(port) <= 65535 and bare and (":" in bare) == bracketed):
        raise EndpointError(
            f"expected an endpoint as HOST:PORT or [IPv6]:PORT with a port from 1 to 65535, got {endpoint!r}: "
            "correct it"
        )


def require_seconds(setting: str, value: float, *, from_zero: bool = False) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a finite number above 0, or 0 as well if ``from_zero``."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)
    if not number or value < 0.0 or (value == 0.0 and not from_zero):
        least = "from 0 on" if from_zero else "above 0"
        raise ConfigError(f"{setting}: expected a number of seconds {least}, got {value!r}")


def open_channel(endpoint: str, credentials: Credentials | None = None) -> grpc.Channel:
    """Open a channel that reconnects within a second and uses no HTTP proxy; plaintext without an authority.

    Raises :class:`EndpointError` for an address that is none, and :class:`ConfigError` for other credentials.
    """
    require_endpoint(endpoint)
    if credentials is not None and not isinstance(credentials, Credentials):
        raise ConfigError(
            f"credentials: expected those of read_credentials(Path(FILE)), or None, got {credentials!r}: read the "
            "file first"
        )
    if credentials is None or credentials.ca is None:
        return grpc.insecure_channel(endpoint, _OPTIONS)
    name = credentials.server_name
    options = _OPTIONS if name is None else (*_OPTIONS, ("grpc.ssl_target_name_override", name))
    secure = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)
    return grpc.secure_channel(endpoint, secure, options)


def _read(entry: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{entry}: {path} cannot be read: {error.strerror}") from error
