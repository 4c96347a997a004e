"""Logs of a server on stderr: text for people, or one JSON object per line for log collectors.

A JSON line has ``time`` (UTC), ``level``, ``logger``, ``message``, the fields of ``extra={"fields": {…}}`` of the
call to the logger, and ``error`` with the traceback if there is one. Callers never see tracebacks.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

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


def configure_logging(*, json_lines: bool) -> None:
    """Send logs to stderr.

    As text: warnings, and changes by operators. As JSON lines: everything from INFO on.
    """
    if json_lines:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    else:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        audit.setLevel(logging.INFO)
