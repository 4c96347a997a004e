from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetContractRequest(_message.Message):
    __slots__ = ("model_version",)
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_version: str
    def __init__(self, model_version: _Optional[str] = ...) -> None: ...

class GetContractResponse(_message.Message):
    __slots__ = ("model_version", "models", "team", "contract_hash", "bundle_digest", "divergence_kind", "budgets")
    class BudgetsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_HASH_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_KIND_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    model_version: str
    models: _containers.RepeatedScalarFieldContainer[str]
    team: str
    contract_hash: str
    bundle_digest: str
    divergence_kind: str
    budgets: _containers.ScalarMap[str, float]
    def __init__(self, model_version: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., team: _Optional[str] = ..., contract_hash: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., divergence_kind: _Optional[str] = ..., budgets: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ActRequest(_message.Message):
    __slots__ = ("model", "model_version", "contract_hash", "step_id", "reset", "batch", "observation", "noise", "action_mask", "episode_id", "episode_step", "temperature", "others", "bundle_digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_HASH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    ACTION_MASK_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPISODE_STEP_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_version: str
    contract_hash: str
    step_id: int
    reset: bool
    batch: int
    observation: bytes
    noise: bytes
    action_mask: bytes
    episode_id: str
    episode_step: int
    temperature: float
    others: _containers.RepeatedCompositeFieldContainer[ActRequest]
    bundle_digest: str
    def __init__(self, model: _Optional[str] = ..., model_version: _Optional[str] = ..., contract_hash: _Optional[str] = ..., step_id: _Optional[int] = ..., reset: bool = ..., batch: _Optional[int] = ..., observation: _Optional[bytes] = ..., noise: _Optional[bytes] = ..., action_mask: _Optional[bytes] = ..., episode_id: _Optional[str] = ..., episode_step: _Optional[int] = ..., temperature: _Optional[float] = ..., others: _Optional[_Iterable[_Union[ActRequest, _Mapping]]] = ..., bundle_digest: _Optional[str] = ...) -> None: ...

class ActResponse(_message.Message):
    __slots__ = ("step_id", "model_version", "batch", "action", "divergence", "behavior_action", "mean", "log_std", "behavior_mean", "behavior_log_std", "logits", "behavior_logits", "policy_weight", "others")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOR_ACTION_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    LOG_STD_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOR_MEAN_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOR_LOG_STD_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOR_LOGITS_FIELD_NUMBER: _ClassVar[int]
    POLICY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    model_version: str
    batch: int
    action: bytes
    divergence: bytes
    behavior_action: bytes
    mean: bytes
    log_std: bytes
    behavior_mean: bytes
    behavior_log_std: bytes
    logits: bytes
    behavior_logits: bytes
    policy_weight: bytes
    others: _containers.RepeatedCompositeFieldContainer[ActResponse]
    def __init__(self, step_id: _Optional[int] = ..., model_version: _Optional[str] = ..., batch: _Optional[int] = ..., action: _Optional[bytes] = ..., divergence: _Optional[bytes] = ..., behavior_action: _Optional[bytes] = ..., mean: _Optional[bytes] = ..., log_std: _Optional[bytes] = ..., behavior_mean: _Optional[bytes] = ..., behavior_log_std: _Optional[bytes] = ..., logits: _Optional[bytes] = ..., behavior_logits: _Optional[bytes] = ..., policy_weight: _Optional[bytes] = ..., others: _Optional[_Iterable[_Union[ActResponse, _Mapping]]] = ...) -> None: ...
