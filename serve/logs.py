"""Logs of a server on stderr: lines for people, or one JSON object per line for collectors that index fields.

Fields are ``time`` (UTC), ``level``, ``logger``, ``message``, what a call to the logger gave as ``extra={"fields":
{…}}``, and ``error`` with the traceback where there is one. Tracebacks stay in the log; callers never see them.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

audit = logging.getLogger("omcda_deploy.serve.audit")  # a line for every call that may change something


class JsonFormatter(logging.Formatter):
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


def log_as_text() -> None:
    """Send warnings, and whatever operators have changed, to stderr as lines for people."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    audit.setLevel(logging.INFO)


def log_as_json() -> None:
    """Send everything from INFO on to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
