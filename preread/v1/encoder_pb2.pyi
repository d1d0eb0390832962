from preread.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpsertStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPSERT_STATUS_UNSPECIFIED: _ClassVar[UpsertStatus]
    UPSERT_STATUS_STORED: _ClassVar[UpsertStatus]
    UPSERT_STATUS_UNCHANGED: _ClassVar[UpsertStatus]
    UPSERT_STATUS_REFUSED: _ClassVar[UpsertStatus]

class StateFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_FORMAT_UNSPECIFIED: _ClassVar[StateFormat]
    STATE_FORMAT_FLOAT32: _ClassVar[StateFormat]
    STATE_FORMAT_BFLOAT16: _ClassVar[StateFormat]
UPSERT_STATUS_UNSPECIFIED: UpsertStatus
UPSERT_STATUS_STORED: UpsertStatus
UPSERT_STATUS_UNCHANGED: UpsertStatus
UPSERT_STATUS_REFUSED: UpsertStatus
STATE_FORMAT_UNSPECIFIED: StateFormat
STATE_FORMAT_FLOAT32: StateFormat
STATE_FORMAT_BFLOAT16: StateFormat

class Passage(_message.Message):
    __slots__ = ("passage_id", "text")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    text: str
    def __init__(self, passage_id: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class UpsertRequest(_message.Message):
    __slots__ = ("collection", "passages", "compression_ratio", "codec", "store_text")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    STORE_TEXT_FIELD_NUMBER: _ClassVar[int]
    collection: str
    passages: _containers.RepeatedCompositeFieldContainer[Passage]
    compression_ratio: int
    codec: str
    store_text: bool
    def __init__(self, collection: _Optional[str] = ..., passages: _Optional[_Iterable[_Union[Passage, _Mapping]]] = ..., compression_ratio: _Optional[int] = ..., codec: _Optional[str] = ..., store_text: _Optional[bool] = ...) -> None: ...

class UpsertResult(_message.Message):
    __slots__ = ("passage_id", "status", "num_tokens", "num_states", "truncated", "message", "num_clipped")
    PASSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STATES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIPPED_FIELD_NUMBER: _ClassVar[int]
    passage_id: str
    status: UpsertStatus
    num_tokens: int
    num_states: int
    truncated: bool
    message: str
    num_clipped: int
    def __init__(self, passage_id: _Optional[str] = ..., status: _Optional[_Union[UpsertStatus, str]] = ..., num_tokens: _Optional[int] = ..., num_states: _Optional[int] = ..., truncated: _Optional[bool] = ..., message: _Optional[str] = ..., num_clipped: _Optional[int] = ...) -> None: ...

class UpsertResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[UpsertResult]
    def __init__(self, results: _Optional[_Iterable[_Union[UpsertResult, _Mapping]]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("collection", "passage_ids")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    collection: str
    passage_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, collection: _Optional[str] = ..., passage_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("num_deleted",)
    NUM_DELETED_FIELD_NUMBER: _ClassVar[int]
    num_deleted: int
    def __init__(self, num_deleted: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("collection",)
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    collection: str
    def __init__(self, collection: _Optional[str] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("collections",)
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    collections: _containers.RepeatedCompositeFieldContainer[_common_pb2.CollectionInfo]
    def __init__(self, collections: _Optional[_Iterable[_Union[_common_pb2.CollectionInfo, _Mapping]]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("encoder", "default_compression_ratio", "default_codec", "dtype", "device", "store", "max_message_bytes")
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_CODEC_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    encoder: _common_pb2.EncoderIdentity
    default_compression_ratio: int
    default_codec: str
    dtype: str
    device: str
    store: str
    max_message_bytes: int
    def __init__(self, encoder: _Optional[_Union[_common_pb2.EncoderIdentity, _Mapping]] = ..., default_compression_ratio: _Optional[int] = ..., default_codec: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., store: _Optional[str] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("texts", "compression_ratio", "format", "split", "keep_in", "caller")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    KEEP_IN_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    compression_ratio: int
    format: StateFormat
    split: bool
    keep_in: str
    caller: str
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., compression_ratio: _Optional[int] = ..., format: _Optional[_Union[StateFormat, str]] = ..., split: _Optional[bool] = ..., keep_in: _Optional[str] = ..., caller: _Optional[str] = ...) -> None: ...

class EncodedPassage(_message.Message):
    __slots__ = ("states", "window_tokens", "truncated", "message")
    STATES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    states: bytes
    window_tokens: _containers.RepeatedScalarFieldContainer[int]
    truncated: bool
    message: str
    def __init__(self, states: _Optional[bytes] = ..., window_tokens: _Optional[_Iterable[int]] = ..., truncated: _Optional[bool] = ..., message: _Optional[str] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("passages", "dim", "compression_ratio", "format", "fingerprint")
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    passages: _containers.RepeatedCompositeFieldContainer[EncodedPassage]
    dim: int
    compression_ratio: int
    format: StateFormat
    fingerprint: str
    def __init__(self, passages: _Optional[_Iterable[_Union[EncodedPassage, _Mapping]]] = ..., dim: _Optional[int] = ..., compression_ratio: _Optional[int] = ..., format: _Optional[_Union[StateFormat, str]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class TouchRequest(_message.Message):
    __slots__ = ("collection", "touched")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    TOUCHED_FIELD_NUMBER: _ClassVar[int]
    collection: str
    touched: _containers.RepeatedCompositeFieldContainer[Touched]
    def __init__(self, collection: _Optional[str] = ..., touched: _Optional[_Iterable[_Union[Touched, _Mapping]]] = ...) -> None: ...

class Touched(_message.Message):
    __slots__ = ("caller", "passage_ids")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    caller: str
    passage_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, caller: _Optional[str] = ..., passage_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class TouchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
