"""Record: one passage as it lies in a store, its byte form with lengths, version and checksums, and legal names.

    magic "PRST" | version u16 | flags u16 | compression_ratio u32 | num_states u32 | num_tokens u32
    | code_size u32 | num_windows u32 | text_bytes u32 | num_clipped u32 | text_digest 32 bytes
    | manifest binding u64 | payload checksum u64 | header checksum u64
    payload: window_tokens u32 x num_windows | codes num_states x code_size | text (UTF-8)

Little-endian, checksums xxh3_64. The header's covers the fields before it and then the passage id (UTF-8), which is not
stored; the payload's the payload alone, so equal texts under two ids share it. `Manifest.binding` ties a record to its
collection and codec. Version 1, read everywhere and written only into collections of that version, has no num_clipped
(its header is 4 bytes shorter) and no id in its checksum.
"""

import re
import secrets
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from cache.errors import DamagedRecord, InvalidName

RECORD_VERSION = 2
_MAGIC = b"PRST"
_START = struct.Struct("<4sH")
_FIELDS = {1: struct.Struct("<4sHHIIIIII32sQQ"), 2: struct.Struct("<4sHHIIIIIII32sQQ")}  # by version
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _FIELDS[RECORD_VERSION].size + _CHECKSUM.size  # of the latest version, which has the longest
DIGEST_BYTES = 32  # of a text's SHA-256
DIGEST_FROM_END = DIGEST_BYTES + 3 * _CHECKSUM.size  # where it begins in a header of any version, from the header's end
_TRUNCATED, _HAS_TEXT = 1, 2

MAX_PASSAGE_ID_BYTES = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_STORAGE_NAME = re.compile(r"~[0-9a-f]{32}")
_TEXT_ID = re.compile(r"[0-9a-f]{64}")


def passage_id_bytes(passage_id: str) -> bytes:
    """The id as stored; ids are the user's. Raises InvalidName when empty, over 512 bytes of UTF-8 or not encodable."""
    try:
        encoded = passage_id.encode()
    except UnicodeEncodeError as exc:
        raise InvalidName(f"passage_id: {passage_id!r} cannot be written as UTF-8: {exc.reason}") from exc
    if not encoded:
        raise InvalidName("passage_id: empty, expected at least one character")
    if len(encoded) > MAX_PASSAGE_ID_BYTES:
        shown = f"{passage_id[:40]!r}... is {len(encoded)} bytes"
        raise InvalidName(f"passage_id: {shown}, at most {MAX_PASSAGE_ID_BYTES} are allowed")
    return encoded


def is_passage_id(passage_id: str) -> bool:
    try:
        return bool(passage_id_bytes(passage_id))
    except InvalidName:
        return False


def is_text_id(passage_id: str) -> bool:
    """Whether it may be an id that is made of a text, its SHA-256 in hex: where states are written through."""
    return _TEXT_ID.fullmatch(passage_id) is not None


def new_storage_name() -> str:
    """One that no collection has, nor can have as its name."""
    return f"~{secrets.token_hex(16)}"


def check_storage_name(name: str) -> str:
    """A collection's name, or what `new_storage_name` made; else raises InvalidName."""
    return name if _STORAGE_NAME.fullmatch(name) else check_name("collection", name)


def check_name(field: str, name: str) -> str:
    """A collection name or alias as it is, fit for file names, Redis keys, command lines; else raises InvalidName."""
    if not _NAME.fullmatch(name):
        expected = "1 to 128 of letters, digits, '.', '_' and '-', the first a letter or digit"
        raise InvalidName(f"{field}: {name[:140]!r}, expected {expected}")
    return name


@dataclass(frozen=True, slots=True)
class Damaged:
    """Given in place of a passage whose stored bytes fail a check; damage costs that passage alone."""

    passage_id: str
    reason: str


class Header(NamedTuple):
    """The fixed part of a stored record."""

    version: int
    flags: int
    compression_ratio: int
    num_states: int
    num_tokens: int
    code_size: int
    num_windows: int
    text_bytes: int
    num_clipped: int  # numbers that lay outside the range the codec was trained for, and were cut to it
    text_digest: bytes
    binding: int  # `Manifest.binding` of the collection it was written into
    payload_checksum: int
    packed: bytes  # its fields in byte form, without the checksum that the passage id goes into

    @classmethod
    def parse(cls, data: bytes, passage_id: str | bytes) -> "Header":
        """The header at the start of `data`. Raises DamagedRecord when it is damaged, unknown, or another passage's."""
        if len(data) < _START.size:
            raise DamagedRecord(f"header of {len(data)} bytes, expected {HEADER_BYTES}")
        magic, version = _START.unpack_from(data)
        if magic != _MAGIC:
            raise DamagedRecord(f"magic {magic!r}, expected {_MAGIC!r}")
        if version not in _FIELDS:
            raise DamagedRecord(f"record version {version} is unknown, expected {' or '.join(map(str, _FIELDS))}")
        size = _FIELDS[version].size
        if len(data) < size + _CHECKSUM.size:
            raise DamagedRecord(f"header of {len(data)} bytes, expected {size + _CHECKSUM.size}")
        packed = bytes(data[:size])
        if data[size : size + _CHECKSUM.size] != _header_checksum(version, packed, passage_id):
            raise DamagedRecord("checksum of the header does not match, or it is another passage's")
        return cls._of(packed, version)

    @classmethod
    def checked(cls, passage_id: str | bytes, data: bytes | None) -> "Header | None":
        """`parse`, with None in place of a header that is missing or damaged."""
        try:
            return None if data is None else cls.parse(data[:HEADER_BYTES], passage_id)
        except DamagedRecord:
            return None

    @classmethod
    def _of(cls, packed: bytes, version: int) -> "Header":
        _, _, flags, *counts, digest, binding, payload_checksum = _FIELDS[version].unpack(packed)
        header = cls._make((version, flags, *(*counts, 0)[:7], digest, binding, payload_checksum, packed))
        if 0 in header[2:7] or (header.text_bytes and not header.flags & _HAS_TEXT):
            raise DamagedRecord("header counts contradict each other")
        return header

    def pack(self, passage_id: str | bytes) -> bytes:
        """The byte form, as the header of that passage."""
        return self.packed + _header_checksum(self.version, self.packed, passage_id)

    def latest(self) -> "Header":
        if self.version == RECORD_VERSION:
            return self
        return self._of(_FIELDS[RECORD_VERSION].pack(_MAGIC, RECORD_VERSION, *self[1:-1]), RECORD_VERSION)

    @property
    def truncated(self) -> bool:
        return bool(self.flags & _TRUNCATED)

    @property
    def checksum(self) -> int:
        """Identifies the stored value among those of its passage: every byte of it goes in."""
        return xxhash.xxh3_64_intdigest(self.packed)

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """num_states, num_tokens, truncated, total_bytes, num_clipped: the summands of a collection's stats."""
        return self.num_states, self.num_tokens, self.flags & _TRUNCATED, self.total_bytes, self.num_clipped

    @property
    def total_bytes(self) -> int:
        """Length of the whole packed record; a store reports it as the passage's size."""
        payload_bytes = 4 * self.num_windows + self.num_states * self.code_size + self.text_bytes
        return len(self.packed) + _CHECKSUM.size + payload_bytes


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One passage as stored, made by `build` (writing) or by `unpack` and `join` (reading, checked)."""

    # uint8 (num_states, code_size), C-contiguous; often a view into what a read brought for several passages.
    codes: NDArray[np.uint8] = field(repr=False)
    window_tokens: tuple[int, ...]
    text: str | None
    header: Header

    @classmethod
    def build(
        cls,
        codes: NDArray[np.uint8],
        *,
        window_tokens: tuple[int, ...],
        compression_ratio: int,
        truncated: bool,
        text_digest: bytes,
        binding: int,
        text: str | None = None,
        num_clipped: int = 0,
        version: int = RECORD_VERSION,
    ) -> "Record":
        """A record to be written; fields as in `Header`. Raises ValueError when the counts do not fit together."""
        codes = np.ascontiguousarray(codes)
        if codes.dtype != np.uint8 or codes.ndim != 2 or 0 in codes.shape:
            raise ValueError(f"codes: {codes.dtype} {codes.shape}, expected uint8 (num_states, code_size), not empty")
        if len(text_digest) != 32:
            raise ValueError(f"text_digest: {len(text_digest)} bytes, expected the 32 of a SHA-256")
        num_states, code_size = codes.shape
        if num_states != _num_states(window_tokens, compression_ratio):
            given = f"windows of {window_tokens} tokens, ratio {compression_ratio}"
            raise ValueError(f"codes: {num_states} rows do not fit {given}")
        encoded = b"" if text is None else text.encode()
        windows = struct.pack(f"<{len(window_tokens)}I", *window_tokens)
        payload_checksum = _payload_checksum(windows, codes, encoded)
        flags = truncated * _TRUNCATED | (text is not None) * _HAS_TEXT
        counts = [compression_ratio, num_states, sum(window_tokens), code_size, len(window_tokens), len(encoded)]
        counts += [num_clipped] if version > 1 else []
        packed = _FIELDS[version].pack(_MAGIC, version, flags, *counts, text_digest, binding, payload_checksum)
        return cls(codes, window_tokens, text, Header._of(packed, version))

    @staticmethod
    def num_bytes(num_states: int, code_size: int, num_windows: int) -> int:
        return HEADER_BYTES + 4 * num_windows + num_states * code_size

    @classmethod
    def unpack(cls, data: bytes, passage_id: str | bytes) -> "Record":
        """The record out of one value, `codes` being a view into it. Raises DamagedRecord when any check fails."""
        header = Header.parse(data[:HEADER_BYTES], passage_id)
        if len(data) != header.total_bytes:
            raise DamagedRecord(f"value of {len(data)} bytes, expected {header.total_bytes}")
        start = len(header.packed) + _CHECKSUM.size
        windows_end = start + 4 * header.num_windows
        codes_end = windows_end + header.num_states * header.code_size
        codes = np.frombuffer(data, dtype=np.uint8, count=codes_end - windows_end, offset=windows_end)
        return cls.join(header, data[start:windows_end], codes, data[codes_end:])

    @classmethod
    def checked(cls, passage_id: str, data: bytes | None) -> "Record | Damaged | None":
        """`unpack`, with Damaged in place of a record that fails a check, and None of None."""
        try:
            return None if data is None else cls.unpack(data, passage_id)
        except DamagedRecord as exc:
            return Damaged(passage_id, str(exc))

    @classmethod
    def join(cls, header: Header, windows: bytes, codes: NDArray[np.uint8], text: bytes) -> "Record":
        """A record out of packed window_tokens, contiguous codes of any shape and text. Raises DamagedRecord."""
        if len(windows) != 4 * header.num_windows or codes.nbytes != header.num_states * header.code_size:
            raise DamagedRecord("lengths do not match the header")
        if len(text) != header.text_bytes:
            raise DamagedRecord(f"text of {len(text)} bytes, expected {header.text_bytes}")
        if _payload_checksum(windows, codes, text) != header.payload_checksum:
            raise DamagedRecord("checksum of the states does not match")
        window_tokens = struct.unpack(f"<{header.num_windows}I", windows)
        # A forged value can carry right checksums, so the counts are checked against each other as well.
        num_states = _num_states(window_tokens, header.compression_ratio)
        if min(window_tokens) < 1 or sum(window_tokens) != header.num_tokens or num_states != header.num_states:
            raise DamagedRecord("window_tokens do not add up")
        try:
            decoded = text.decode() if header.flags & _HAS_TEXT else None
        except UnicodeDecodeError as exc:
            raise DamagedRecord("text is not UTF-8") from exc
        return cls(codes.reshape(header.num_states, header.code_size), window_tokens, decoded, header)

    @property
    def payload(self) -> tuple[bytes, memoryview, bytes]:
        """Packed window_tokens, codes and text."""
        windows = struct.pack(f"<{self.header.num_windows}I", *self.window_tokens)
        return windows, self.codes.data, b"" if self.text is None else self.text.encode()

    def pack(self, passage_id: str | bytes) -> bytes:
        """The whole record as one value, which can be read under that id only."""
        return b"".join((self.header.pack(passage_id), *self.payload))


def _header_checksum(version: int, packed: bytes, passage_id: str | bytes) -> bytes:
    encoded_id = passage_id if isinstance(passage_id, bytes) else passage_id.encode()
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed if version == 1 else packed + encoded_id))


def _payload_checksum(windows: bytes, codes: NDArray[np.uint8], text: bytes) -> int:
    digest = xxhash.xxh3_64(windows)
    digest.update(codes.data)
    digest.update(text)
    return digest.intdigest()


def _num_states(window_tokens: tuple[int, ...], compression_ratio: int) -> int:
    return sum(-(-tokens // compression_ratio) for tokens in window_tokens)
