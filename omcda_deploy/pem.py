"""Checks of certificates and private keys, which gRPC would refuse at a connection, in lines of its own."""

from __future__ import annotations

import ssl
from pathlib import Path

from omcda_deploy.errors import ConfigError


def require_pair(certificate: Path, key: Path) -> None:
    """Check PEM files of a certificate, or a chain that begins with it, and its private key without a password.

    Raises :class:`ConfigError` for files that are none, or that do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # else it would ask for one on the terminal
    except OSError as error:  # ssl.SSLError is one
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key} is not the private key of the certificate in {certificate}") from error
        raise ConfigError(
            f"expected a certificate in {certificate}, and its private key without a password in {key}, both as PEM"
        ) from error


def require_authority(file: Path) -> None:
    """Raise :class:`ConfigError` unless a file has certificates in PEM, with any comments between them."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:
        raise ConfigError(f"expected the authority's certificates in {file}, as PEM") from error
