"""Protobuf to plain values and back. Knows no calls and computes no states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.manifest import Manifest
from cache.store import StoreStats
from checkpoint import EncoderIdentity
from encoder_worker.errors import InvalidRequest
from encoder_worker.passage_encoder import States
from preread.v1 import common_pb2, encoder_pb2

BYTES_PER_VALUE = {encoder_pb2.STATE_FORMAT_FLOAT32: 4, encoder_pb2.STATE_FORMAT_BFLOAT16: 2}


def state_format(value: encoder_pb2.StateFormat) -> encoder_pb2.StateFormat:
    """The format asked for; none is float32.

    Raises:
        InvalidRequest: a format of a newer client.
    """
    if value == encoder_pb2.STATE_FORMAT_UNSPECIFIED:
        return encoder_pb2.STATE_FORMAT_FLOAT32
    if value not in BYTES_PER_VALUE:
        raise InvalidRequest("format", int(value), "STATE_FORMAT_FLOAT32 or STATE_FORMAT_BFLOAT16")
    return value


def pack_states(states: States, format: encoder_pb2.StateFormat) -> bytes:
    """(num_states, dim) float32 to little-endian rows; bfloat16 is rounded to nearest, ties to even."""
    if format == encoder_pb2.STATE_FORMAT_BFLOAT16:
        bits = np.ascontiguousarray(states).view(np.uint32)
        rounded = bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))
        return (rounded >> np.uint32(16)).astype("<u2").tobytes()
    return states.astype("<f4", copy=False).tobytes()


def pack_identity(identity: EncoderIdentity | Manifest) -> common_pb2.EncoderIdentity:
    return common_pb2.EncoderIdentity(
        fingerprint=identity.fingerprint,
        checkpoint=identity.checkpoint,
        dim=identity.dim,
        max_passage_tokens=identity.max_passage_tokens,
        passage_template=identity.passage_template,
        pooling_version=identity.pooling_version,
    )


def pack_collection(manifest: Manifest, stats: StoreStats, aliases: Sequence[str]) -> common_pb2.CollectionInfo:
    return common_pb2.CollectionInfo(
        name=manifest.collection,
        aliases=aliases,
        encoder=pack_identity(manifest),
        compression_ratio=manifest.compression_ratio,
        codec=manifest.codec,
        num_passages=stats.num_passages,
        num_states=stats.num_states,
        num_tokens=stats.num_tokens,
        num_truncated=stats.num_truncated,
        size_bytes=stats.size_bytes,
        stores_text=manifest.stores_text,
        num_clipped=stats.num_clipped,
    )
