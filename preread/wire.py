"""An upsert stream's messages, filled from a caller's passages while the stream asks for them.

Protobuf from and to the values of preread; the only file of the client that knows message bodies.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, cast, get_args

from preread import arguments as checks
from preread.types import (
    CollectionInfo,
    Degraded,
    EncoderIdentity,
    EncoderInfo,
    ModelInfo,
    OnMiss,
    Passage,
    Reranking,
    RerankOptions,
    Result,
    Stage,
    StageScore,
    Status,
    Summary,
    TierUse,
    Timings,
    UpsertResult,
    UpsertStatus,
    Warmed,
    parse_stages,
)
from preread.v1 import common_pb2, encoder_pb2, rerank_pb2

# A message goes out when either is reached: small enough to be acknowledged soon, large enough to batch.
MAX_PASSAGES_PER_MESSAGE = 64
MAX_CHARACTERS_PER_MESSAGE = 1 << 20

AnyPassage = Passage | Mapping[str, Any]
Passages = Iterable[AnyPassage] | AsyncIterable[AnyPassage]


class Upload:
    """Iterates over messages, sync or async. `error` is what the caller's passages raised.

    gRPC reads a stream on a thread or task of its own and would answer such an error with CANCELLED or UNKNOWN.
    """

    def __init__(
        self, passages: Passages, collection: str, compression_ratio: int, codec: str, store_text: bool
    ) -> None:
        """
        Raises:
            TypeError, InvalidRequest: an argument that cannot be put on the wire; a passage raises when it is read.
        """
        self.error: Exception | None = None
        self._passages = passages if isinstance(passages, AsyncIterable) else checks.many("passages", passages)
        self._collection = checks.text("collection", collection)
        self._compression_ratio = checks.integer("compression_ratio", compression_ratio)
        self._codec = checks.optional_text("codec", codec)
        self._store_text = checks.flag("store_text", store_text)
        self._waiting: list[encoder_pb2.Passage] = []
        self._num_read = 0
        self._num_characters = 0

    def __iter__(self) -> Iterator[encoder_pb2.UpsertRequest]:
        try:
            if not isinstance(self._passages, Iterable):
                raise TypeError(f"passages is {checks.show(self._passages)}; only AsyncClient reads it")
            for passage in self._passages:
                if self._add(passage):
                    yield self._message()
            if self._waiting:
                yield self._message()
        except Exception as exc:
            self.error = exc
            raise

    async def __aiter__(self) -> AsyncIterator[encoder_pb2.UpsertRequest]:
        if not isinstance(self._passages, AsyncIterable):
            for message in self:
                yield message
            return
        try:
            async for passage in self._passages:
                if self._add(passage):
                    yield self._message()
            if self._waiting:
                yield self._message()
        except Exception as exc:
            self.error = exc
            raise

    def _add(self, passage: AnyPassage) -> bool:
        """True: the message is full."""
        passage_id, text = checks.passage(self._num_read, passage)
        self._num_read += 1
        self._waiting.append(encoder_pb2.Passage(passage_id=passage_id, text=text))
        self._num_characters += len(text)
        return len(self._waiting) >= MAX_PASSAGES_PER_MESSAGE or self._num_characters >= MAX_CHARACTERS_PER_MESSAGE

    def _message(self) -> encoder_pb2.UpsertRequest:
        message = encoder_pb2.UpsertRequest(
            collection=self._collection,
            passages=self._waiting,
            compression_ratio=self._compression_ratio,
            codec=self._codec,
            store_text=self._store_text,
        )
        self._waiting, self._num_characters = [], 0
        return message


IDS_PER_DELETE = 10_000  # 5 MB where each has the 512 bytes that an id may have


def pack_request(query: str, candidates: Iterable[Any], options: RerankOptions) -> rerank_pb2.RerankRequest:
    """A plain string is an id where a collection is named, else a text.

    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    unknown = options.keys() - RerankOptions.__optional_keys__
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}; known: {sorted(RerankOptions.__optional_keys__)}")
    on_miss = options.get("on_miss")
    if on_miss is not None and on_miss not in get_args(OnMiss):
        raise checks.invalid("on_miss", ascii(on_miss), f"{', '.join(get_args(OnMiss))} or None")
    collection = checks.optional_text("collection", options.get("collection"))
    checked = (
        checks.candidate(i, candidate, is_id=bool(collection))
        for i, candidate in enumerate(checks.many("candidates", candidates))
    )
    return rerank_pb2.RerankRequest(
        query=checks.text("query", query),
        instruction=checks.text_or_absent("instruction", options.get("instruction")),
        candidates=[rerank_pb2.Candidate(passage_id=one.passage_id, text=one.text) for one in checked],
        collection=collection,
        top_n=checks.integer("top_n", options.get("top_n")),
        compression_ratio=checks.integer("compression_ratio", options.get("compression_ratio")),
        on_miss=f"ON_MISS_{on_miss.upper() if on_miss else 'UNSPECIFIED'}",
        return_text=checks.flag("return_text", options.get("return_text", False)),
        model=checks.optional_text("model", options.get("model")),
        stages=_pack_stages(options.get("stages")),
    )


def _pack_stages(stages: object) -> list[rerank_pb2.Stage]:
    if not stages:
        return []
    if isinstance(stages, str):
        try:
            stages = parse_stages(stages)
        except ValueError as exc:
            raise checks.invalid("stages", ascii(stages), f"stages that fit ({exc})") from exc
    packed = []
    for i, stage in enumerate(checks.many("stages", stages)):
        if not isinstance(stage, Stage):
            raise TypeError(f"stages[{i}] is {checks.show(stage)}; expected a Stage")
        ratio = checks.integer(f"stages[{i}].compression_ratio", stage.compression_ratio)
        packed.append(rerank_pb2.Stage(compression_ratio=ratio, keep=checks.integer(f"stages[{i}].keep", stage.keep)))
    return packed


def pack_warm(
    passage_ids: Iterable[str], collection: str, instruction: str | None, compression_ratio: int, model: str
) -> rerank_pb2.WarmRequest:
    """
    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    return rerank_pb2.WarmRequest(
        collection=checks.text("collection", collection),
        passage_ids=checks.texts("passage_ids", passage_ids),
        instruction=checks.text_or_absent("instruction", instruction),
        compression_ratio=checks.integer("compression_ratio", compression_ratio),
        model=checks.optional_text("model", model),
    )


def pack_deletes(passage_ids: Iterable[str], collection: str) -> list[encoder_pb2.DeleteRequest]:
    """One request per IDS_PER_DELETE ids, at least one: a server bounds the fields of a message.

    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    name, ids = checks.text("collection", collection), checks.texts("passage_ids", passage_ids)
    return [
        encoder_pb2.DeleteRequest(collection=name, passage_ids=ids[start : start + IDS_PER_DELETE])
        for start in range(0, max(len(ids), 1), IDS_PER_DELETE)
    ]


def pack_stats(collection: str) -> encoder_pb2.GetStatsRequest:
    """
    Raises:
        TypeError, InvalidRequest: an argument that cannot be put on the wire.
    """
    return encoder_pb2.GetStatsRequest(collection=checks.optional_text("collection", collection))


def unpack_warmed(message: rerank_pb2.WarmResponse) -> Warmed:
    return Warmed(
        message.model,
        message.num_passages,
        message.num_windows,
        tuple(message.missing_ids),
        tuple(TierUse(tier.name, tier.num_kept, tier.num_bytes, tier.max_bytes) for tier in message.tiers),
    )


def unpack_response(message: rerank_pb2.RerankResponse) -> Reranking:
    return Reranking(unpack_results(message.results), unpack_summary(message))


def unpack_results(messages: Iterable[rerank_pb2.Result]) -> tuple[Result, ...]:
    return tuple(
        Result(
            index=m.index,
            passage_id=m.passage_id,
            status=cast(Status, _enum_word(common_pb2.CandidateStatus, m.status, "CANDIDATE_STATUS_")),
            score=m.score if m.HasField("score") else None,
            margin=m.margin if m.HasField("margin") else None,
            text=m.text if m.HasField("text") else None,
            message=m.message,
            num_states=m.num_states,
            compression_ratio=m.compression_ratio,
            truncated=m.truncated,
            stages=tuple(
                StageScore(s.compression_ratio, score=s.score, margin=s.margin, num_states=s.num_states)
                for s in m.stages
            ),
        )
        for m in messages
    )


def unpack_summary(message: rerank_pb2.RerankResponse | rerank_pb2.RerankStreamResponse.Summary) -> Summary:
    times = message.timings
    return Summary(
        model=message.model,
        timings=Timings(
            times.fetch_seconds, times.encode_seconds, times.queue_seconds, times.compute_seconds, times.total_seconds
        ),
        num_scored=message.num_scored,
        num_query_tokens=message.num_query_tokens,
        query_truncated=message.query_truncated,
        compression_ratio=message.compression_ratio,
        stages=_unpack_stages(message.stages),
        stopped_early=message.stopped_early,
        degraded=_unpack_degraded(message.degraded) if message.HasField("degraded") else None,
    )


def _unpack_stages(messages: Iterable[rerank_pb2.Stage]) -> tuple[Stage, ...]:
    return tuple(Stage(m.compression_ratio, m.keep) for m in messages)


def _unpack_degraded(message: rerank_pb2.Degraded) -> Degraded:
    return Degraded(message.reason, message.compression_ratio, _unpack_stages(message.stages))


def unpack_model(message: rerank_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        backend=message.backend,
        checkpoint=message.checkpoint,
        encoder=unpack_identity(message.encoder) if message.HasField("encoder") else None,
        default_instruction=message.default_instruction,
        default_compression_ratio=message.default_compression_ratio,
        max_query_tokens=message.max_query_tokens,
        max_candidates=message.max_candidates,
        max_message_bytes=message.max_message_bytes,
        dtype=message.dtype,
        device=message.device,
        encodes_on_demand=message.encodes_on_demand,
        max_passage_tokens=message.max_passage_tokens,
        notice=message.notice,
    )


def unpack_collection(message: common_pb2.CollectionInfo) -> CollectionInfo:
    return CollectionInfo(
        name=message.name,
        aliases=tuple(message.aliases),
        encoder=unpack_identity(message.encoder),
        compression_ratio=message.compression_ratio,
        codec=message.codec,
        num_passages=message.num_passages,
        num_states=message.num_states,
        num_tokens=message.num_tokens,
        num_truncated=message.num_truncated,
        size_bytes=message.size_bytes,
        stores_text=message.stores_text,
        num_clipped=message.num_clipped,
    )


def unpack_identity(message: common_pb2.EncoderIdentity) -> EncoderIdentity:
    return EncoderIdentity(
        fingerprint=message.fingerprint,
        checkpoint=message.checkpoint,
        dim=message.dim,
        max_passage_tokens=message.max_passage_tokens,
        passage_template=message.passage_template,
        pooling_version=message.pooling_version,
    )


def unpack_encoder(message: encoder_pb2.DescribeResponse) -> EncoderInfo:
    return EncoderInfo(
        encoder=unpack_identity(message.encoder),
        default_compression_ratio=message.default_compression_ratio,
        default_codec=message.default_codec,
        dtype=message.dtype,
        device=message.device,
        store=message.store,
        max_message_bytes=message.max_message_bytes,
    )


def unpack_upserts(message: encoder_pb2.UpsertResponse) -> Iterator[UpsertResult]:
    for m in message.results:
        yield UpsertResult(
            passage_id=m.passage_id,
            status=cast(UpsertStatus, _enum_word(encoder_pb2.UpsertStatus, m.status, "UPSERT_STATUS_")),
            num_tokens=m.num_tokens,
            num_states=m.num_states,
            truncated=m.truncated,
            message=m.message,
            num_clipped=m.num_clipped,
        )


def _enum_word(enum: object, value: int, prefix: str) -> str:
    """CANDIDATE_STATUS_TOO_LONG -> too_long; a value of a newer server reads as unspecified."""
    try:
        name: str = enum.Name(value)  # type: ignore[attr-defined]  # protobuf's enum wrappers share no public type
    except ValueError:
        return "unspecified"
    return name.removeprefix(prefix).lower()
