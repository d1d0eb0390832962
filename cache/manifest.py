"""Manifest: properties shared by all passages of a collection, written once when the collection is created.

A collection is told by its `identity`, 128 random bits: shards that are to be merged are created with one, and it stays
over copy, export and rename. Version 1 has none; such a collection is read, and written with records of version 1.
A store finds its passages by `storage_name`, which stays over a rename too, so a rename rewrites the manifest alone.
"""

import base64
import json
import re
import secrets
from collections.abc import Container
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

import xxhash

from cache import DEFAULT_CODEC
from cache.codecs import Codec
from cache.errors import CacheError, InvalidName, ManifestError
from cache.record import check_name, check_storage_name, new_storage_name

MANIFEST_VERSION = 2
_IDENTITY = re.compile(r"[0-9a-f]{32}")
# Of an encoder: checkpoint.EncoderIdentity, which this package does not import.
_OF_ENCODER = ("fingerprint", "checkpoint", "dim", "max_passage_tokens", "passage_template", "pooling_version")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One encoder identity, one stored ratio, one codec. Raises ManifestError, naming a field that breaks a rule."""

    collection: str  # its name now
    fingerprint: str  # of the encoder (weights, tokenizer, template, limits, pooling); states of two never mix
    checkpoint: str  # the name the encoder was opened by, for people
    dim: int
    max_passage_tokens: int
    passage_template: str
    pooling_version: int
    compression_ratio: int  # tokens per stored state; a request may use any multiple of it
    codec: str = DEFAULT_CODEC  # FAISS factory string
    codec_table: bytes = field(default=b"", repr=False)  # its trained numbers (`Codec.table()`)
    stores_text: bool = True
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))  # ISO 8601
    version: int = MANIFEST_VERSION
    identity: str = field(default_factory=partial(secrets.token_hex, 16))  # 32 hex digits; empty in version 1
    storage_name: str = ""  # that a store keeps its passages under: the name it was created by, unless that was taken

    def __post_init__(self) -> None:
        for spec in fields(self):
            if type(value := getattr(self, spec.name)) is not spec.type:
                raise ManifestError(f"{spec.name}: {value!r:.80}, expected {getattr(spec.type, '__name__', spec.type)}")
        _check_version(self.version)
        object.__setattr__(self, "storage_name", self.storage_name or self.collection)
        if self.version == 1:
            object.__setattr__(self, "identity", "")
        elif not _IDENTITY.fullmatch(self.identity):
            raise ManifestError(f"identity: {self.identity!r:.80}, expected 32 hex digits")
        if not self.fingerprint:
            raise ManifestError("fingerprint: empty; expected that of the encoder")
        for name in ("dim", "max_passage_tokens", "compression_ratio"):
            if getattr(self, name) < 1:
                raise ManifestError(f"{name}: {getattr(self, name)}, expected at least 1")
        try:
            check_name("collection", self.collection)
            check_storage_name(self.storage_name)
            self.make_codec()
        except CacheError as exc:
            raise ManifestError(str(exc)) from exc

    @classmethod
    def of(cls, encoder: object, /, **rest: Any) -> "Manifest":
        """A manifest of an `EncoderIdentity`; `rest` are the other fields."""
        return cls(**{name: getattr(encoder, name) for name in _OF_ENCODER}, **rest)

    def stored(self, taken: Container[str]) -> Self:
        """As it is created next to collections with these storage names."""
        is_taken = self.collection in taken
        return replace(self, storage_name=new_storage_name() if is_taken else self.collection)

    def make_codec(self) -> Codec:
        return Codec.from_table(self.codec, self.dim, self.codec_table)

    @property
    def binding(self) -> int:
        """64 bits in every record, of the identity and all that decides how codes are read; in version 1 of JSON."""
        if self.version == 1:  # as it was created
            return xxhash.xxh3_64_intdigest(replace(self, collection=self.storage_name).to_json())
        bound = (self.identity, self.fingerprint, self.dim, self.compression_ratio, self.codec, self.codec_table.hex())
        return xxhash.xxh3_64_intdigest(json.dumps(bound).encode())

    def to_json(self) -> bytes:
        """UTF-8 JSON with the codec table in base64 and a checksum."""
        values: dict[str, Any] = asdict(self)
        if self.version == 1:
            del values["identity"]
        if self.storage_name == self.collection:  # software from before it existed reads all but renamed collections
            del values["storage_name"]
        values["codec_table"] = base64.b64encode(self.codec_table).decode()
        values["checksum"] = _checksum(values)
        return json.dumps(values, ensure_ascii=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, collection: str | None = None) -> "Manifest":
        """A whole manifest of a known version, of the `collection` where one is given; else raises ManifestError."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise ManifestError(f"manifest: not JSON: {exc}") from exc
        if not isinstance(values, dict):
            raise ManifestError(f"manifest: a JSON {type(values).__name__}, expected an object")
        _check_version(values.get("version"))
        if values.pop("checksum", None) != _checksum(values):
            raise ManifestError("manifest: checksum does not match its content")
        expected = {spec.name for spec in fields(cls)} - ({"identity"} if values["version"] == 1 else set())
        values.setdefault("storage_name", values.get("collection"))
        if unexpected := values.keys() ^ expected:
            raise ManifestError(f"manifest: missing or unknown fields {sorted(unexpected)}")
        try:
            values["codec_table"] = base64.b64decode(values["codec_table"], validate=True)
        except (TypeError, ValueError) as exc:
            raise ManifestError("codec_table: not base64") from exc
        manifest = cls(**values)
        if collection is not None and manifest.collection != collection:
            raise ManifestError(f"collection: {manifest.collection!r}, expected {collection!r}")
        return manifest


def storage_name_of(manifest: bytes, collection: str) -> str:
    """The storage name of a collection whose manifest may be damaged, as far as it is legible."""
    if b'"storage_name"' in manifest:  # else it was never renamed
        with suppress(ValueError, AttributeError, RecursionError, InvalidName):
            return check_storage_name(str(json.loads(manifest).get("storage_name")))
    return collection


def _check_version(version: object) -> None:
    if type(version) is not int or version not in (1, MANIFEST_VERSION):
        raise ManifestError(f"version: {version!r} is unknown, expected 1 or {MANIFEST_VERSION}")


def _checksum(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())
