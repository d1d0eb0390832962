from preread.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Candidate(_message.Message):
    __slots__ = ("passage_id", "text")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    text: str
    def __init__(self, passage_id: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("compression_ratio", "keep")
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    compression_ratio: int
    keep: int
    def __init__(self, compression_ratio: _Optional[int] = ..., keep: _Optional[int] = ...) -> None: ...

class RerankRequest(_message.Message):
    __slots__ = ("query", "instruction", "candidates", "collection", "top_n", "compression_ratio", "on_miss", "return_text", "model", "stages")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    TOP_N_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    ON_MISS_FIELD_NUMBER: _ClassVar[int]
    RETURN_TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    query: str
    instruction: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    collection: str
    top_n: int
    compression_ratio: int
    on_miss: _common_pb2.OnMiss
    return_text: bool
    model: str
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    def __init__(self, query: _Optional[str] = ..., instruction: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., collection: _Optional[str] = ..., top_n: _Optional[int] = ..., compression_ratio: _Optional[int] = ..., on_miss: _Optional[_Union[_common_pb2.OnMiss, str]] = ..., return_text: _Optional[bool] = ..., model: _Optional[str] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ...) -> None: ...

class StageScore(_message.Message):
    __slots__ = ("compression_ratio", "score", "margin", "num_states")
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    NUM_STATES_FIELD_NUMBER: _ClassVar[int]
    compression_ratio: int
    score: float
    margin: float
    num_states: int
    def __init__(self, compression_ratio: _Optional[int] = ..., score: _Optional[float] = ..., margin: _Optional[float] = ..., num_states: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("index", "passage_id", "status", "score", "margin", "text", "message", "num_states", "compression_ratio", "truncated", "stages", "found_in", "found_id")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STATES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    FOUND_IN_FIELD_NUMBER: _ClassVar[int]
    FOUND_ID_FIELD_NUMBER: _ClassVar[int]
    index: int
    passage_id: str
    status: _common_pb2.CandidateStatus
    score: float
    margin: float
    text: str
    message: str
    num_states: int
    compression_ratio: int
    truncated: bool
    stages: _containers.RepeatedCompositeFieldContainer[StageScore]
    found_in: str
    found_id: str
    def __init__(self, index: _Optional[int] = ..., passage_id: _Optional[str] = ..., status: _Optional[_Union[_common_pb2.CandidateStatus, str]] = ..., score: _Optional[float] = ..., margin: _Optional[float] = ..., text: _Optional[str] = ..., message: _Optional[str] = ..., num_states: _Optional[int] = ..., compression_ratio: _Optional[int] = ..., truncated: _Optional[bool] = ..., stages: _Optional[_Iterable[_Union[StageScore, _Mapping]]] = ..., found_in: _Optional[str] = ..., found_id: _Optional[str] = ...) -> None: ...

class Degraded(_message.Message):
    __slots__ = ("reason", "compression_ratio", "stages")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    reason: str
    compression_ratio: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    def __init__(self, reason: _Optional[str] = ..., compression_ratio: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("fetch_seconds", "encode_seconds", "queue_seconds", "compute_seconds", "total_seconds")
    FETCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    fetch_seconds: float
    encode_seconds: float
    queue_seconds: float
    compute_seconds: float
    total_seconds: float
    def __init__(self, fetch_seconds: _Optional[float] = ..., encode_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ...) -> None: ...

class RerankResponse(_message.Message):
    __slots__ = ("results", "model", "timings", "num_scored", "num_query_tokens", "query_truncated", "compression_ratio", "stages", "stopped_early", "degraded", "num_looked_up", "num_found")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    NUM_SCORED_FIELD_NUMBER: _ClassVar[int]
    NUM_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUERY_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    STOPPED_EARLY_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    NUM_LOOKED_UP_FIELD_NUMBER: _ClassVar[int]
    NUM_FOUND_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    model: str
    timings: Timings
    num_scored: int
    num_query_tokens: int
    query_truncated: bool
    compression_ratio: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    stopped_early: bool
    degraded: Degraded
    num_looked_up: int
    num_found: int
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., model: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., num_scored: _Optional[int] = ..., num_query_tokens: _Optional[int] = ..., query_truncated: _Optional[bool] = ..., compression_ratio: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., stopped_early: _Optional[bool] = ..., degraded: _Optional[_Union[Degraded, _Mapping]] = ..., num_looked_up: _Optional[int] = ..., num_found: _Optional[int] = ...) -> None: ...

class RerankStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: RerankRequest
    def __init__(self, request: _Optional[_Union[RerankRequest, _Mapping]] = ...) -> None: ...

class RerankStreamResponse(_message.Message):
    __slots__ = ("batch", "summary")
    class Batch(_message.Message):
        __slots__ = ("results",)
        RESULTS_FIELD_NUMBER: _ClassVar[int]
        results: _containers.RepeatedCompositeFieldContainer[Result]
        def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...
    class Summary(_message.Message):
        __slots__ = ("model", "timings", "num_scored", "num_query_tokens", "query_truncated", "compression_ratio", "stages", "stopped_early", "degraded", "num_looked_up", "num_found")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        TIMINGS_FIELD_NUMBER: _ClassVar[int]
        NUM_SCORED_FIELD_NUMBER: _ClassVar[int]
        NUM_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
        QUERY_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
        COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
        STAGES_FIELD_NUMBER: _ClassVar[int]
        STOPPED_EARLY_FIELD_NUMBER: _ClassVar[int]
        DEGRADED_FIELD_NUMBER: _ClassVar[int]
        NUM_LOOKED_UP_FIELD_NUMBER: _ClassVar[int]
        NUM_FOUND_FIELD_NUMBER: _ClassVar[int]
        model: str
        timings: Timings
        num_scored: int
        num_query_tokens: int
        query_truncated: bool
        compression_ratio: int
        stages: _containers.RepeatedCompositeFieldContainer[Stage]
        stopped_early: bool
        degraded: Degraded
        num_looked_up: int
        num_found: int
        def __init__(self, model: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., num_scored: _Optional[int] = ..., num_query_tokens: _Optional[int] = ..., query_truncated: _Optional[bool] = ..., compression_ratio: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., stopped_early: _Optional[bool] = ..., degraded: _Optional[_Union[Degraded, _Mapping]] = ..., num_looked_up: _Optional[int] = ..., num_found: _Optional[int] = ...) -> None: ...
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    batch: RerankStreamResponse.Batch
    summary: RerankStreamResponse.Summary
    def __init__(self, batch: _Optional[_Union[RerankStreamResponse.Batch, _Mapping]] = ..., summary: _Optional[_Union[RerankStreamResponse.Summary, _Mapping]] = ...) -> None: ...

class RerankManyRequest(_message.Message):
    __slots__ = ("request", "queries")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    request: RerankRequest
    queries: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request: _Optional[_Union[RerankRequest, _Mapping]] = ..., queries: _Optional[_Iterable[str]] = ...) -> None: ...

class RerankManyResponse(_message.Message):
    __slots__ = ("index", "response")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    index: int
    response: RerankResponse
    def __init__(self, index: _Optional[int] = ..., response: _Optional[_Union[RerankResponse, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "backend", "checkpoint", "encoder", "default_instruction", "default_compression_ratio", "max_query_tokens", "max_candidates", "max_message_bytes", "dtype", "device", "encodes_on_demand", "max_passage_tokens", "notice")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ENCODES_ON_DEMAND_FIELD_NUMBER: _ClassVar[int]
    MAX_PASSAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    name: str
    backend: str
    checkpoint: str
    encoder: _common_pb2.EncoderIdentity
    default_instruction: str
    default_compression_ratio: int
    max_query_tokens: int
    max_candidates: int
    max_message_bytes: int
    dtype: str
    device: str
    encodes_on_demand: bool
    max_passage_tokens: int
    notice: str
    def __init__(self, name: _Optional[str] = ..., backend: _Optional[str] = ..., checkpoint: _Optional[str] = ..., encoder: _Optional[_Union[_common_pb2.EncoderIdentity, _Mapping]] = ..., default_instruction: _Optional[str] = ..., default_compression_ratio: _Optional[int] = ..., max_query_tokens: _Optional[int] = ..., max_candidates: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., encodes_on_demand: _Optional[bool] = ..., max_passage_tokens: _Optional[int] = ..., notice: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ListCollectionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCollectionsResponse(_message.Message):
    __slots__ = ("collections",)
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    collections: _containers.RepeatedCompositeFieldContainer[_common_pb2.CollectionInfo]
    def __init__(self, collections: _Optional[_Iterable[_Union[_common_pb2.CollectionInfo, _Mapping]]] = ...) -> None: ...

class ListPassagesRequest(_message.Message):
    __slots__ = ("collection", "page_size", "page_token")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    collection: str
    page_size: int
    page_token: str
    def __init__(self, collection: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPassagesResponse(_message.Message):
    __slots__ = ("passage_ids", "next_page_token")
    PASSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    passage_ids: _containers.RepeatedScalarFieldContainer[str]
    next_page_token: str
    def __init__(self, passage_ids: _Optional[_Iterable[str]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WarmRequest(_message.Message):
    __slots__ = ("collection", "passage_ids", "instruction", "compression_ratio", "model")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    collection: str
    passage_ids: _containers.RepeatedScalarFieldContainer[str]
    instruction: str
    compression_ratio: int
    model: str
    def __init__(self, collection: _Optional[str] = ..., passage_ids: _Optional[_Iterable[str]] = ..., instruction: _Optional[str] = ..., compression_ratio: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class TierUse(_message.Message):
    __slots__ = ("name", "num_kept", "num_bytes", "max_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_kept: int
    num_bytes: int
    max_bytes: int
    def __init__(self, name: _Optional[str] = ..., num_kept: _Optional[int] = ..., num_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class WarmResponse(_message.Message):
    __slots__ = ("model", "num_passages", "num_windows", "missing_ids", "tiers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_PASSAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    MISSING_IDS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    num_passages: int
    num_windows: int
    missing_ids: _containers.RepeatedScalarFieldContainer[str]
    tiers: _containers.RepeatedCompositeFieldContainer[TierUse]
    def __init__(self, model: _Optional[str] = ..., num_passages: _Optional[int] = ..., num_windows: _Optional[int] = ..., missing_ids: _Optional[_Iterable[str]] = ..., tiers: _Optional[_Iterable[_Union[TierUse, _Mapping]]] = ...) -> None: ...
