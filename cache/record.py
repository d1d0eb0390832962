"""Record: one passage as it lies in a store, and its byte form with lengths, version and checksums.

The byte form is a fixed header and a payload:

    magic "PRST" | version u16 | flags u16 | compression_ratio u32 | num_states u32 | num_tokens u32
    | code_size u32 | num_windows u32 | text_bytes u32 | text_digest 32 bytes | manifest checksum u64
    | payload checksum u64 | header checksum u64
    payload: window_tokens u32 x num_windows | codes num_states x code_size | text (UTF-8)

Little-endian, checksums xxh3_64. The header checksum covers the payload's, so it alone identifies a stored value, and a
header can be trusted without reading what follows. Does not know codecs, ids or stores; bytes read are not trusted.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from cache.errors import DamagedRecord

RECORD_VERSION = 1
_MAGIC = b"PRST"
_FIELDS = struct.Struct("<4sHHIIIIII32sQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_TRUNCATED, _HAS_TEXT = 1, 2


def record_bytes(num_states: int, code_size: int, num_windows: int = 1, text_bytes: int = 0) -> int:
    """Length of a packed record of such a passage."""
    return HEADER_BYTES + 4 * num_windows + num_states * code_size + text_bytes


@dataclass(frozen=True, slots=True)
class Damaged:
    """Given in place of a passage whose stored bytes fail a check; damage costs that passage alone."""

    passage_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a stored record; `packed` is its byte form, HEADER_BYTES long, checksum included."""

    compression_ratio: int
    num_states: int
    num_tokens: int
    code_size: int
    num_windows: int
    text_bytes: int
    has_text: bool
    truncated: bool
    text_digest: bytes
    manifest_checksum: int
    payload_checksum: int
    checksum: int
    packed: bytes = field(repr=False)

    @classmethod
    def parse(cls, packed: bytes) -> "Header":
        """Raises DamagedRecord where the bytes are not a whole, undamaged header of a known version."""
        if len(packed) != HEADER_BYTES:
            raise DamagedRecord(f"header of {len(packed)} bytes, expected {HEADER_BYTES}")
        magic, version, flags, *counts, digest, manifest_checksum, payload_checksum = _FIELDS.unpack_from(packed)
        ratio, num_states, num_tokens, code_size, num_windows, text_bytes = counts
        if magic != _MAGIC:
            raise DamagedRecord(f"magic {magic!r}, expected {_MAGIC!r}")
        if version != RECORD_VERSION:
            raise DamagedRecord(f"record version {version} is unknown, expected {RECORD_VERSION}")
        (checksum,) = _CHECKSUM.unpack_from(packed, _FIELDS.size)
        if checksum != xxhash.xxh3_64_intdigest(memoryview(packed)[: _FIELDS.size]):
            raise DamagedRecord("checksum of the header does not match")
        truncated, has_text = bool(flags & _TRUNCATED), bool(flags & _HAS_TEXT)
        if not (ratio and num_states and num_tokens and code_size and num_windows) or (text_bytes and not has_text):
            raise DamagedRecord("header counts contradict each other")
        return cls(
            ratio, num_states, num_tokens, code_size, num_windows, text_bytes, has_text, truncated, digest,
            manifest_checksum, payload_checksum, checksum, bytes(packed),
        )  # fmt: skip

    @property
    def total_bytes(self) -> int:
        """Length of the whole packed record."""
        return record_bytes(self.num_states, self.code_size, self.num_windows, self.text_bytes)


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One passage as stored: encoded states and what is needed to use them.

    codes: uint8 (num_states, code_size), C-contiguous; often a read-only view into a mapped file or a network buffer.
    Made by `Record.build` (writing) or `unpack` / `join` (reading, checked).
    """

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
        manifest_checksum: int,
        text: str | None = None,
    ) -> "Record":
        """A record to be written; computes its checksums. Raises ValueError where the counts do not fit together.

        manifest_checksum: of the manifest it is written under, so that it is never read under another one.
        """
        codes = np.ascontiguousarray(codes)
        if codes.dtype != np.uint8 or codes.ndim != 2 or 0 in codes.shape:
            raise ValueError(f"codes: {codes.dtype} {codes.shape}, expected uint8 (num_states, code_size), not empty")
        if len(text_digest) != 32:
            raise ValueError(f"text_digest: {len(text_digest)} bytes, expected the 32 of a SHA-256")
        if codes.shape[0] != _num_states(window_tokens, compression_ratio):
            raise ValueError(
                f"codes: {codes.shape[0]} rows do not fit windows of {window_tokens} tokens, ratio {compression_ratio}"
            )
        encoded = b"" if text is None else text.encode()
        payload_checksum = _payload_checksum(pack_windows(window_tokens), codes, encoded)
        fields = _FIELDS.pack(
            _MAGIC, RECORD_VERSION, truncated * _TRUNCATED | (text is not None) * _HAS_TEXT, compression_ratio,
            codes.shape[0], sum(window_tokens), codes.shape[1], len(window_tokens), len(encoded),
            text_digest, manifest_checksum, payload_checksum,
        )  # fmt: skip
        header = Header.parse(fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)))
        return cls(codes, window_tokens, text, header)

    @property
    def compression_ratio(self) -> int:
        return self.header.compression_ratio

    @property
    def truncated(self) -> bool:
        return self.header.truncated

    @property
    def text_digest(self) -> bytes:
        return self.header.text_digest

    @property
    def checksum(self) -> int:
        """Identifies the stored value: it covers every byte of it."""
        return self.header.checksum

    @property
    def num_tokens(self) -> int:
        return self.header.num_tokens

    @property
    def size_bytes(self) -> int:
        """Length of the packed form; what a store reports as the passage's size."""
        return self.header.total_bytes


def pack(record: Record) -> bytes:
    """The whole record as one value."""
    text = b"" if record.text is None else record.text.encode()
    return b"".join((record.header.packed, pack_windows(record.window_tokens), record.codes.data, text))


def unpack(data: bytes) -> Record:
    """A record out of one value, `codes` being a view into it. Raises DamagedRecord: nothing is used unchecked."""
    header = Header.parse(data[:HEADER_BYTES])
    if len(data) != header.total_bytes:
        raise DamagedRecord(f"value of {len(data)} bytes, expected {header.total_bytes}")
    windows_end = HEADER_BYTES + 4 * header.num_windows
    codes_end = windows_end + header.num_states * header.code_size
    codes = np.frombuffer(data, dtype=np.uint8, count=codes_end - windows_end, offset=windows_end)
    return join(header, data[HEADER_BYTES:windows_end], codes, data[codes_end:])


def join(header: Header, windows: bytes, codes: NDArray[np.uint8], text: bytes) -> Record:
    """A record out of parts that were stored apart; every length, count and checksum is checked first.

    codes: uint8 of num_states * code_size bytes, any shape, contiguous. Raises DamagedRecord.
    """
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
        decoded = text.decode() if header.has_text else None
    except UnicodeDecodeError as exc:
        raise DamagedRecord("text is not UTF-8") from exc
    return Record(codes.reshape(header.num_states, header.code_size), window_tokens, decoded, header)


def pack_windows(window_tokens: tuple[int, ...]) -> bytes:
    """Window lengths, little-endian u32."""
    return struct.pack(f"<{len(window_tokens)}I", *window_tokens)


def _payload_checksum(windows: bytes, codes: NDArray[np.uint8], text: bytes) -> int:
    digest = xxhash.xxh3_64(windows)
    digest.update(codes.data)
    digest.update(text)
    return digest.intdigest()


def _num_states(window_tokens: tuple[int, ...], compression_ratio: int) -> int:
    return sum(-(-tokens // compression_ratio) for tokens in window_tokens)
