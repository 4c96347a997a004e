"""Recordings: steps that servers answered, and rewards that clients reported, in files of their own.

A recording is a folder. Each model, and a client's reports, have a folder in it, with *segments*::

    agent_0/20261129T134501.123456Z-3f9c1a2b.arrows        steps of one version of agent_0
    reports/20261129T134500.998001Z-77ab01cd.arrows        rewards and ends

A segment is a stream of Arrow's IPC format, which pyarrow, pandas, Polars, DuckDB and others read. Record batches
are only ever appended, and each is on the disk before the next one is begun: a process that dies loses what it had
not written yet, less than a second, and at most the last batch of its segment is torn.

The metadata of the schema say of whom the segment is; those of a record batch have ``lost``, the rows that its
writer had to drop until then. The last batch of a segment that was closed is empty and has ``closed``.

:mod:`.columns` has the layout, :mod:`.segments` the files, :mod:`.recorder` the thread that writes them,
:mod:`.reader` reads them, and :mod:`omcda_deploy.datasets.recorded` joins them to a dataset.
"""

from __future__ import annotations

from typing import Any

from omcda_deploy.errors import MissingExtraError

FORMAT = "omcda-deploy recording 1"  # "format" in the metadata of a schema
REPORTS = "reports"  # folder of what clients report


def import_pyarrow() -> Any:
    """Import pyarrow, which only recordings need. Raises :class:`MissingExtraError`."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "record") from error
    return pyarrow
