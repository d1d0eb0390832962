"""Encode: texts to pooled states, nothing stored. A text that cannot be encoded costs itself only."""

from __future__ import annotations

from cache.states import text_digest
from encoder_worker import messages
from encoder_worker.errors import InvalidRequest, Overloaded
from encoder_worker.passage_encoder import EncodingFailed, States, Tokenized
from encoder_worker.scheduler import Priority, Worker
from preread.v1 import encoder_pb2


async def encode(engine: Worker, request: encoder_pb2.EncodeRequest) -> encoder_pb2.EncodeResponse:
    """
    Raises:
        InvalidRequest: a field is out of range, or the answer would be larger than a message may be.
        Overloaded: too many tokens are under way.
    """
    config, encoder = engine.config, engine.encoder
    if not 1 <= len(request.texts) <= config.max_texts:
        raise InvalidRequest("texts", len(request.texts), f"1..{config.max_texts} texts")
    ratio = request.compression_ratio or encoder.settings.default_compression_ratio
    if ratio < 1:
        raise InvalidRequest("compression_ratio", ratio, "0 (the default) or more")
    format = messages.state_format(request.format)
    refused = await engine.call(lambda: [engine.why_not(text) for text in request.texts])
    good = [text for text, why in zip(request.texts, refused, strict=True) if why is None]
    tokenized = await engine.tokenize(good, split=request.split)
    _check_size(engine, tokenized, ratio, messages.BYTES_PER_VALUE[format])
    windows = await engine.scheduler.encode(tokenized, ratio, Priority.ON_DEMAND)
    packed = await engine.call(_pack_all, tokenized, windows, ratio, format)
    answers = iter(packed)
    return encoder_pb2.EncodeResponse(
        passages=[next(answers) if why is None else encoder_pb2.EncodedPassage(message=why) for why in refused],
        dim=encoder.dim,
        compression_ratio=ratio,
        format=format,
        fingerprint=encoder.identity.fingerprint,
    )


def _check_size(engine: Worker, tokenized: list[Tokenized], ratio: int, bytes_per_value: int) -> None:
    """Before anything is computed."""
    num_bytes = sum(text.num_states(ratio) for text in tokenized) * engine.encoder.dim * bytes_per_value
    if num_bytes > engine.config.max_answer_bytes:
        expected = f"fewer: their states are {num_bytes:,} bytes, at most {engine.config.max_answer_bytes:,} are sent"
        raise InvalidRequest("texts", len(tokenized), expected)
    num_tokens = sum(text.num_tokens for text in tokenized)
    under_way = engine.scheduler.on_demand_tokens
    if under_way and under_way + num_tokens > engine.config.max_queue_tokens:
        raise Overloaded(f"{under_way:,} tokens are under way; at most {engine.config.max_queue_tokens:,} may be")


def _pack_all(
    tokenized: list[Tokenized],
    windows: list[list[States | EncodingFailed]],
    ratio: int,
    format: encoder_pb2.StateFormat,
) -> list[encoder_pb2.EncodedPassage]:
    return [_pack(*pair, ratio, format) for pair in zip(tokenized, windows, strict=True)]


def _pack(
    text: Tokenized, windows: list[States | EncodingFailed], ratio: int, format: encoder_pb2.StateFormat
) -> encoder_pb2.EncodedPassage:
    joined = text.join(windows, ratio, _NO_DIGEST)
    if isinstance(joined, EncodingFailed):
        return encoder_pb2.EncodedPassage(message=str(joined))
    return encoder_pb2.EncodedPassage(
        states=messages.pack_states(joined.states, format),
        window_tokens=joined.window_tokens,
        truncated=joined.truncated,
    )


_NO_DIGEST = text_digest("")  # digests do not travel: the caller has the text
