"""Options of a server process, and the command line made from them.

``omcda-deploy serve``, ``python -m omcda_deploy.serve`` and the supervisor's child processes all build a
:class:`ServeOptions`. Each field states its help text and how it is parsed once, in its metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK, EVERYWHERE = "127.0.0.1", "::"
GRACE_S = 5.0


def _cli(help_text: str, flag: str = "", **parsing: Any) -> dict[str, Any]:
    """Return the metadata of an option. ``flag``: without dashes, if it is not the field's name."""
    return {"help": help_text, "flag": flag, "parsing": parsing}


@dataclass(frozen=True)
class Listen:
    """Addresses of one server. Port 0 takes a free one; a service whose port is None is not served.

    ``admin_port`` is on loopback, whatever ``host`` is. ``health_port`` has no TLS and no limits, for probes that
    know no TLS and must be answered at any load, as those of Kubernetes.
    """

    host: str = field(default=LOOPBACK, metadata=_cli("Address to listen on; :: for all, of IPv4 too."))
    port: int = field(default=0, metadata=_cli("Port of the policy services; 0 takes a free one.", type=int))
    metrics_port: int | None = field(
        default=None, metadata=_cli("Port of /metrics, for Prometheus.", type=int)
    )
    admin_port: int | None = field(
        default=None, metadata=_cli("Port on which this machine may load and switch versions.", type=int)
    )
    health_port: int | None = field(
        default=None,
        metadata=_cli("Port of grpc.health.v1 alone, in plaintext and without limits, for probes.", type=int),
    )

    def shifted(self, offset: int) -> Listen:
        """Return the same addresses with every port raised by ``offset``."""
        ports = {
            entry.name: port + offset
            for entry in dataclasses.fields(self)
            if entry.name != "host" and (port := getattr(self, entry.name)) is not None
        }
        return dataclasses.replace(self, **ports)

    def usable(self) -> Listen:
        """Return the addresses that this machine has: without IPv6, those of IPv4 for ``::``, which means all."""
        if self.host != EVERYWHERE:
            return self
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                probe.bind((EVERYWHERE, 0))
        except OSError:
            return dataclasses.replace(self, host="0.0.0.0")
        return self


@dataclass(frozen=True)
class ServeOptions:
    """Everything that a server is started with.

    ``source``: a bundle, or a folder of bundles by version. ``models``: agents, or ``team``; all if empty.
    """

    source: Path
    models: tuple[str, ...] = field(
        default=(), metadata=_cli("Agent or 'team'; repeatable; all if omitted.", flag="model")
    )
    listen: Listen = Listen()
    config: Path | None = field(
        default=None, metadata=_cli("TOML file: guard, limits, TLS, tokens (docs/serving.md).", type=Path)
    )
    trace: bool = field(
        default=False, metadata=_cli("Send OpenTelemetry spans, as the OTEL_… variables say.")
    )
    log_json: bool = field(default=False, metadata=_cli("Log JSON lines to stderr."))
    grace_s: float = field(
        default=GRACE_S,
        metadata=_cli("Seconds in which calls are still answered after SIGTERM.", flag="grace", type=float),
    )
    supervisor: int | None = field(
        default=None,
        metadata=_cli("Id of the parent process; the server stops when that process has ended.", type=int),
    )
    pin: str | None = field(
        default=None,
        metadata=_cli("VERSION@DIGEST[@PREVIOUS] that answered before this start; a supervisor sets it."),
    )
    record: Path | None = field(
        default=None,
        metadata=_cli("Folder to record all answered steps into (docs/recording.md).", type=Path),
    )

    def to_argv(self) -> list[str]:
        """Return the arguments from which :meth:`parse` makes these options again."""
        arguments = []
        for entry, flag in _option_fields():
            value = getattr(self.listen if entry.name in _LISTEN else self, entry.name)
            if value == entry.default:
                continue
            if value is True:
                arguments.append(flag)
            else:
                values = value if isinstance(value, tuple) else (value,)
                arguments += [f"{flag}={part}" for part in values]
        return [*arguments, "--", str(self.source)]

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> ServeOptions:
        """Parse a command line; ``sys.argv`` if None. Exits with status 2 and a usage message if it is wrong."""
        parser = argparse.ArgumentParser(prog="python -m omcda_deploy.serve", description="Serve a bundle.")
        parser.add_argument("source", type=Path, help="a bundle, or a folder of bundles named by version")
        for entry, flag in _option_fields():
            parsing = {"default": entry.default, "help": entry.metadata["help"], **entry.metadata["parsing"]}
            if entry.default is False:
                parsing["action"] = "store_true"
            elif entry.default == ():
                parsing |= {"action": "append", "default": []}
            parser.add_argument(flag, dest=entry.name, **parsing)
        values = vars(parser.parse_args(arguments))
        listen = Listen(**{name: values.pop(name) for name in _LISTEN})
        return cls(**values | {"models": tuple(values["models"]), "listen": listen})


_LISTEN = tuple(entry.name for entry in dataclasses.fields(Listen))


def _option_fields() -> list[tuple[dataclasses.Field[Any], str]]:
    """Return the fields that are options, with their flags."""
    entries = (*dataclasses.fields(ServeOptions), *dataclasses.fields(Listen))
    return [
        (entry, "--" + (entry.metadata["flag"] or entry.name.replace("_", "-")))
        for entry in entries
        if entry.metadata
    ]


HELP = {entry.name: entry.metadata["help"] for entry, _ in _option_fields()}  # text by name of the field
