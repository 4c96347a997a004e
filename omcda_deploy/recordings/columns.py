"""Columns of segments, and numpy arrays as columns of Arrow.

Shapes: R rows, k agents of a model, n the entries of their actions, joined, O those of their observations.

A segment of steps:

| column | type | |
|---|---|---|
| `time` | timestamp | when the step was answered |
| `episode_id`, `episode_step` | string, uint64 | the client's; empty and 0 where it sends none |
| `row` | uint32 | row of the request, as one request may be a step of many episodes |
| `temperature` | float32 | factor of the noise: 0 without noise, NaN where the client does not say |
| `observation` | float32 [O] | |
| `noise` | float32 [n] | zeros where none came |
| `action_mask` | uint8 [n] | discrete actions only |
| `action`, `divergence`, the parameters of both distributions, `policy_weight` | as answered | |
| `log_prob`, `behavior_log_prob` | float64 [k] | of the action that was answered, in [-1, 1], at temperature 1 |

A segment of reports has the rows of an episode's steps, and is a team's:

| column | type | |
|---|---|---|
| `time`, `episode_id`, `episode_step`, `row` | | as above |
| `reward`, `terminated`, `truncated` | float64, uint8, uint8 | |
| `fallback` | uint8 | 1 where a fallback acted for one of the agents |
| `next_observation`, `next_action_mask`, `state`, `next_state` | any number | empty where not told |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM
from omcda_deploy.protos.tensors import DTYPES, answer_tensors, input_tensors
from omcda_deploy.recordings import import_pyarrow
from omcda_deploy.spec import TeamSpec

TEXT, TIME = "text", "time"  # kinds besides numpy's
ANY = -1  # width of a column whose rows differ in length

Values: TypeAlias = "NDArray[Any] | Sequence[Any]"  # [R] or [R, width]; a list for texts and widths of ANY


class Column(NamedTuple):
    """A column: ``kind`` is numpy's name of a type, or :data:`TEXT` or :data:`TIME` (ns since 1970, UTC).

    ``width``: entries of a row; None for a plain number.
    """

    name: str
    kind: str
    width: int | None = None


_INDEX = (
    Column("time", TIME),
    Column("episode_id", TEXT),
    Column("episode_step", "<u8"),
    Column("row", "<u4"),
)
REPORT_COLUMNS = (
    *_INDEX,
    Column("reward", "<f8"),
    Column("terminated", "u1"),
    Column("truncated", "u1"),
    Column("fallback", "u1"),
    Column("next_observation", "<f4", ANY),
    Column("next_action_mask", "u1", ANY),
    Column("state", "<f4", ANY),
    Column("next_state", "<f4", ANY),
)


def step_columns(spec: TeamSpec, model: str) -> tuple[Column, ...]:
    """Return the columns of a model's steps."""
    tensors = (*input_tensors(spec, model), *answer_tensors(spec, model))
    per_agent = len(spec.agents) if model == TEAM else None
    return (
        *_INDEX,
        Column("temperature", "<f4"),
        *(Column(tensor.name, DTYPES[tensor.datatype].str, tensor.width) for tensor in tensors),
        Column("log_prob", "<f8", per_agent),
        Column("behavior_log_prob", "<f8", per_agent),
    )


def schema_of(columns: Sequence[Column], metadata: Mapping[str, str]) -> Any:
    """Return Arrow's schema of ``columns``."""
    pa = import_pyarrow()
    return pa.schema([pa.field(c.name, _type_of(c, pa), nullable=False) for c in columns], metadata=metadata)


def batch_of(schema: Any, columns: Sequence[Column], values: Mapping[str, Values]) -> Any:
    """Return a record batch of ``values``, by name; arrays are used as they lie in memory."""
    pa = import_pyarrow()
    return pa.RecordBatch.from_arrays([_array_of(c, values[c.name], pa) for c in columns], schema=schema)


def arrays_of(table: Any) -> dict[str, Any]:
    """Return the columns of a table as numpy arrays, by name; lists where rows differ in length."""
    pa = import_pyarrow()
    arrays: dict[str, Any] = {}
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if pa.types.is_fixed_size_list(field.type):
            numbers = column.flatten().to_numpy(zero_copy_only=False)
            arrays[field.name] = numbers.reshape(-1, field.type.list_size)
        elif pa.types.is_list(field.type):
            numbers, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
            arrays[field.name] = [numbers[a:b] for a, b in pairwise(offsets)]
        elif pa.types.is_timestamp(field.type):
            arrays[field.name] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        elif pa.types.is_string(field.type):
            arrays[field.name] = np.array(column.to_pylist(), object)
        else:
            arrays[field.name] = column.to_numpy(zero_copy_only=False)
    return arrays


def _type_of(column: Column, pa: Any) -> Any:
    if column.kind == TEXT:
        return pa.string()
    if column.kind == TIME:
        return pa.timestamp("ns", "UTC")
    number = pa.from_numpy_dtype(np.dtype(column.kind))
    if column.width is None:
        return number
    # Entries are never absent either; without saying so, readers would look for a bitmap.
    entry = pa.field("item", number, nullable=False)
    return pa.list_(entry) if column.width == ANY else pa.list_(entry, column.width)


def _array_of(column: Column, values: Any, pa: Any) -> Any:
    kind = _type_of(column, pa)
    if column.kind == TEXT:  # pa.array() would import pandas, where that is installed
        texts = [text.encode() for text in values]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    if column.width == ANY:
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        numbers = np.concatenate([np.zeros(0, column.kind), *values]).astype(column.kind)
        return pa.ListArray.from_arrays(
            _numbers(offsets, pa.int32(), pa), _numbers(numbers, kind.value_type, pa), type=kind
        )
    numbers = np.ascontiguousarray(values, "<i8" if column.kind == TIME else column.kind)
    if column.width is None:
        return _numbers(numbers, kind, pa)
    flat = _numbers(numbers.reshape(-1), kind.value_type, pa)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _numbers(values: NDArray[Any], kind: Any, pa: Any) -> Any:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
