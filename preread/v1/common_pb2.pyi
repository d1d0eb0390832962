from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CandidateStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANDIDATE_STATUS_UNSPECIFIED: _ClassVar[CandidateStatus]
    CANDIDATE_STATUS_HIT: _ClassVar[CandidateStatus]
    CANDIDATE_STATUS_ENCODED: _ClassVar[CandidateStatus]
    CANDIDATE_STATUS_MISSING: _ClassVar[CandidateStatus]
    CANDIDATE_STATUS_CORRUPT: _ClassVar[CandidateStatus]
    CANDIDATE_STATUS_TOO_LONG: _ClassVar[CandidateStatus]
    CANDIDATE_STATUS_FAILED: _ClassVar[CandidateStatus]

class OnMiss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_MISS_UNSPECIFIED: _ClassVar[OnMiss]
    ON_MISS_ENCODE: _ClassVar[OnMiss]
    ON_MISS_SKIP: _ClassVar[OnMiss]
    ON_MISS_FAIL: _ClassVar[OnMiss]
CANDIDATE_STATUS_UNSPECIFIED: CandidateStatus
CANDIDATE_STATUS_HIT: CandidateStatus
CANDIDATE_STATUS_ENCODED: CandidateStatus
CANDIDATE_STATUS_MISSING: CandidateStatus
CANDIDATE_STATUS_CORRUPT: CandidateStatus
CANDIDATE_STATUS_TOO_LONG: CandidateStatus
CANDIDATE_STATUS_FAILED: CandidateStatus
ON_MISS_UNSPECIFIED: OnMiss
ON_MISS_ENCODE: OnMiss
ON_MISS_SKIP: OnMiss
ON_MISS_FAIL: OnMiss

class EncoderIdentity(_message.Message):
    __slots__ = ("fingerprint", "checkpoint", "dim", "max_passage_tokens", "passage_template", "pooling_version")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_PASSAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    POOLING_VERSION_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    checkpoint: str
    dim: int
    max_passage_tokens: int
    passage_template: str
    pooling_version: int
    def __init__(self, fingerprint: _Optional[str] = ..., checkpoint: _Optional[str] = ..., dim: _Optional[int] = ..., max_passage_tokens: _Optional[int] = ..., passage_template: _Optional[str] = ..., pooling_version: _Optional[int] = ...) -> None: ...

class CollectionInfo(_message.Message):
    __slots__ = ("name", "aliases", "encoder", "compression_ratio", "codec", "num_passages", "num_states", "num_tokens", "num_truncated", "size_bytes", "stores_text", "num_clipped")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    NUM_PASSAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_STATES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORES_TEXT_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIPPED_FIELD_NUMBER: _ClassVar[int]
    name: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    encoder: EncoderIdentity
    compression_ratio: int
    codec: str
    num_passages: int
    num_states: int
    num_tokens: int
    num_truncated: int
    size_bytes: int
    stores_text: bool
    num_clipped: int
    def __init__(self, name: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., encoder: _Optional[_Union[EncoderIdentity, _Mapping]] = ..., compression_ratio: _Optional[int] = ..., codec: _Optional[str] = ..., num_passages: _Optional[int] = ..., num_states: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_truncated: _Optional[int] = ..., size_bytes: _Optional[int] = ..., stores_text: _Optional[bool] = ..., num_clipped: _Optional[int] = ...) -> None: ...
