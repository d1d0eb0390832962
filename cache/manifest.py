"""Manifest: what every passage of a collection has in common, written once when the collection is created.

Its JSON form carries a checksum and is validated strictly on reading, because it may come from a shared store. Does not
know where it is kept.
"""

import base64
import binascii
import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Protocol

import xxhash

from cache.codec_names import DEFAULT_CODEC
from cache.codecs import Codec
from cache.errors import CacheError, ManifestError
from cache.names import check_name

MANIFEST_VERSION = 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Identity(Protocol):
    """What tells an encoder from others: checkpoint.EncoderIdentity, which this package does not know."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def checkpoint(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def max_passage_tokens(self) -> int: ...

    @property
    def passage_template(self) -> str: ...

    @property
    def pooling_version(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One encoder identity, one stored ratio, one codec. Raises ManifestError naming the field that breaks a rule.

    fingerprint: of the encoder (weights, tokenizer, template, limits, pooling); states of two fingerprints never mix
    checkpoint: the name the encoder was opened by, for people
    compression_ratio: tokens per stored state; a request may ask for any multiple of it
    codec, codec_table: FAISS factory string and its trained numbers (`Codec.table()`), empty where nothing is trained
    stores_text: whether texts are kept beside the states
    created_at: ISO 8601, UTC
    """

    collection: str
    fingerprint: str
    checkpoint: str
    dim: int
    max_passage_tokens: int
    passage_template: str
    pooling_version: int
    compression_ratio: int
    codec: str = DEFAULT_CODEC
    codec_table: bytes = field(default=b"", repr=False)
    stores_text: bool = True
    created_at: str = field(default_factory=_now)
    version: int = MANIFEST_VERSION

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if type(value) is not spec.type:
                expected = getattr(spec.type, "__name__", spec.type)
                raise ManifestError(f"{spec.name}: {value!r:.80}, expected {expected}")
        if self.version != MANIFEST_VERSION:
            raise ManifestError(f"version: {self.version} is unknown, expected {MANIFEST_VERSION}")
        if not self.fingerprint:
            raise ManifestError("fingerprint: empty, expected the encoder's")
        for name in ("dim", "max_passage_tokens", "compression_ratio"):
            if getattr(self, name) < 1:
                raise ManifestError(f"{name}: {getattr(self, name)}, expected at least 1")
        try:
            check_name("collection", self.collection)
            self.make_codec()
        except CacheError as exc:
            raise ManifestError(str(exc)) from exc

    @classmethod
    def of(cls, identity: Identity, **rest: Any) -> "Manifest":
        """A manifest of this encoder; `rest` are the other fields."""
        return cls(
            fingerprint=identity.fingerprint,
            checkpoint=identity.checkpoint,
            dim=identity.dim,
            max_passage_tokens=identity.max_passage_tokens,
            passage_template=identity.passage_template,
            pooling_version=identity.pooling_version,
            **rest,
        )

    def make_codec(self) -> Codec:
        """The trained codec of this collection."""
        return Codec.from_table(self.codec, self.dim, self.codec_table)

    @property
    def checksum(self) -> int:
        """Identifies this manifest; every record written under it carries it."""
        return xxhash.xxh3_64_intdigest(self.to_json())

    def to_json(self) -> bytes:
        """UTF-8 JSON with the codec table in base64 and a checksum."""
        values: dict[str, Any] = asdict(self)
        values["codec_table"] = base64.b64encode(self.codec_table).decode()
        values["checksum"] = _checksum(values)
        return json.dumps(values, ensure_ascii=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Raises ManifestError for anything but an undamaged manifest of a known version."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise ManifestError(f"manifest: not JSON: {exc}") from exc
        if not isinstance(values, dict):
            raise ManifestError(f"manifest: a JSON {type(values).__name__}, expected an object")
        if values.get("version") != MANIFEST_VERSION:
            raise ManifestError(f"version: {values.get('version')!r} is unknown, expected {MANIFEST_VERSION}")
        checksum = values.pop("checksum", None)
        if checksum != _checksum(values):
            raise ManifestError("manifest: checksum does not match its content")
        if unexpected := values.keys() ^ {spec.name for spec in fields(cls)}:
            raise ManifestError(f"manifest: missing or unknown fields {sorted(unexpected)}")
        try:
            values["codec_table"] = base64.b64decode(values["codec_table"], validate=True)
        except (binascii.Error, TypeError, ValueError) as exc:
            raise ManifestError("codec_table: not base64") from exc
        return cls(**values)


def _checksum(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())
