from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VersionRequest(_message.Message):
    __slots__ = ("version", "expected_current", "previous", "evidence", "change", "undoes", "as_held")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CURRENT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    UNDOES_FIELD_NUMBER: _ClassVar[int]
    AS_HELD_FIELD_NUMBER: _ClassVar[int]
    version: str
    expected_current: str
    previous: str
    evidence: str
    change: str
    undoes: str
    as_held: bool
    def __init__(self, version: _Optional[str] = ..., expected_current: _Optional[str] = ..., previous: _Optional[str] = ..., evidence: _Optional[str] = ..., change: _Optional[str] = ..., undoes: _Optional[str] = ..., as_held: bool = ...) -> None: ...

class RecordRequest(_message.Message):
    __slots__ = ("folder",)
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    folder: str
    def __init__(self, folder: _Optional[str] = ...) -> None: ...

class ConfigRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStreamsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EndStreamsRequest(_message.Message):
    __slots__ = ("client",)
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    client: str
    def __init__(self, client: _Optional[str] = ...) -> None: ...

class ControlStreams(_message.Message):
    __slots__ = ("streams",)
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    streams: _containers.RepeatedCompositeFieldContainer[ControlStream]
    def __init__(self, streams: _Optional[_Iterable[_Union[ControlStream, _Mapping]]] = ...) -> None: ...

class ControlStream(_message.Message):
    __slots__ = ("client", "age_s", "idle_s", "steps")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    client: str
    age_s: float
    idle_s: float
    steps: int
    def __init__(self, client: _Optional[str] = ..., age_s: _Optional[float] = ..., idle_s: _Optional[float] = ..., steps: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("current", "previous", "shadow", "versions", "models", "uptime_s", "contract_hash", "serving", "recording", "recorded_rows", "lost_rows", "evidence")
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_HASH_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    RECORDING_FIELD_NUMBER: _ClassVar[int]
    RECORDED_ROWS_FIELD_NUMBER: _ClassVar[int]
    LOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    current: str
    previous: str
    shadow: str
    versions: _containers.RepeatedCompositeFieldContainer[HeldVersion]
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    uptime_s: float
    contract_hash: str
    serving: bool
    recording: str
    recorded_rows: int
    lost_rows: int
    evidence: str
    def __init__(self, current: _Optional[str] = ..., previous: _Optional[str] = ..., shadow: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[HeldVersion, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., uptime_s: _Optional[float] = ..., contract_hash: _Optional[str] = ..., serving: bool = ..., recording: _Optional[str] = ..., recorded_rows: _Optional[int] = ..., lost_rows: _Optional[int] = ..., evidence: _Optional[str] = ...) -> None: ...

class HeldVersion(_message.Message):
    __slots__ = ("version", "bundle_digest", "idle_s", "folder_digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    FOLDER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: str
    bundle_digest: str
    idle_s: float
    folder_digest: str
    def __init__(self, version: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., idle_s: _Optional[float] = ..., folder_digest: _Optional[str] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "answers", "answers_per_s", "p50_ms", "p99_ms", "agents", "shadow_difference", "shadow_answers", "shadow_failures")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_PER_S_FIELD_NUMBER: _ClassVar[int]
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FAILURES_FIELD_NUMBER: _ClassVar[int]
    model: str
    answers: int
    answers_per_s: float
    p50_ms: float
    p99_ms: float
    agents: _containers.RepeatedCompositeFieldContainer[AgentStatus]
    shadow_difference: float
    shadow_answers: int
    shadow_failures: int
    def __init__(self, model: _Optional[str] = ..., answers: _Optional[int] = ..., answers_per_s: _Optional[float] = ..., p50_ms: _Optional[float] = ..., p99_ms: _Optional[float] = ..., agents: _Optional[_Iterable[_Union[AgentStatus, _Mapping]]] = ..., shadow_difference: _Optional[float] = ..., shadow_answers: _Optional[int] = ..., shadow_failures: _Optional[int] = ...) -> None: ...

class AgentStatus(_message.Message):
    __slots__ = ("agent", "divergence", "budget", "guard", "threshold", "exceeded", "replaced")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    EXCEEDED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    agent: str
    divergence: float
    budget: float
    guard: str
    threshold: float
    exceeded: float
    replaced: float
    def __init__(self, agent: _Optional[str] = ..., divergence: _Optional[float] = ..., budget: _Optional[float] = ..., guard: _Optional[str] = ..., threshold: _Optional[float] = ..., exceeded: _Optional[float] = ..., replaced: _Optional[float] = ...) -> None: ...
