"""Logs of a server on stderr: text for people, or one JSON object per line for log collectors.

A JSON line has ``time`` (UTC), ``level``, ``logger``, ``message``, the fields of ``extra={"fields": {…}}`` of the
call to the logger, and ``error`` with the traceback if there is one. Callers never see tracebacks.

Every line is JSON then: warnings, and errors that end a thread or the process, pass through the loggers. gRPC's own
messages do not, and are turned off (:mod:`omcda_deploy.serve.event_loop`).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType

log = logging.getLogger(__name__)
audit = logging.getLogger("omcda_deploy.serve.audit")  # one line per call that may change something


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _tells_more_than_a_lost_caller(record: logging.LogRecord) -> bool:
    """Return False for gRPC's tracebacks of answers that could not be sent, as their callers had gone."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def configure_logging(*, json_lines: bool) -> None:
    """Send logs to stderr.

    As text, with the time: warnings, and changes by operators. As JSON lines: everything from INFO on.
    """
    handler = logging.StreamHandler(sys.stderr)
    if json_lines:
        handler.setFormatter(JsonFormatter())
        logging.captureWarnings(True)
        sys.excepthook = _log_error
        threading.excepthook = lambda error: _log_error(error.exc_type, error.exc_value, error.exc_traceback)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        audit.setLevel(logging.INFO)
    level = logging.INFO if json_lines else logging.getLogger().level
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_tells_more_than_a_lost_caller)


def _log_error(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None:
        log.critical("unexpected error", exc_info=(kind, error, trace))
