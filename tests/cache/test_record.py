"""The byte form of a record: what was packed comes back, and nothing else is accepted."""

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DamagedRecord
from cache.record import HEADER_BYTES, Header, Record, pack, unpack


@st.composite
def records(draw):
    ratio = draw(st.integers(1, 9))
    window_tokens = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    num_states = sum(-(-tokens // ratio) for tokens in window_tokens)
    codes = np.random.default_rng(draw(st.integers(0, 999))).integers(
        0, 256, (num_states, draw(st.integers(1, 9))), dtype=np.uint8
    )
    return Record.build(
        codes,
        window_tokens=window_tokens,
        compression_ratio=ratio,
        truncated=draw(st.booleans()),
        text_digest=draw(st.binary(min_size=32, max_size=32)),
        manifest_checksum=draw(st.integers(0, 2**64 - 1)),
        text=draw(st.none() | st.text(max_size=20)),
    )


@given(records())
def test_unpacking_gives_what_was_packed(same, record):
    packed = pack(record)
    assert len(packed) == record.size_bytes
    assert same(unpack(packed), record)
    assert Header.parse(packed[:HEADER_BYTES]) == record.header


@given(records(), st.data())
def test_any_flipped_bit_is_found(record, data):
    packed = bytearray(pack(record))
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedRecord):
        unpack(bytes(packed))


@given(records(), st.data())
def test_any_other_length_is_found(record, data):
    packed = pack(record)
    with pytest.raises(DamagedRecord):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(DamagedRecord, match="expected"):
        unpack(packed + data.draw(st.binary(min_size=1, max_size=8)))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(junk):
    with pytest.raises(DamagedRecord):
        unpack(junk)
    with pytest.raises(DamagedRecord):
        unpack(b"PRST\x01\x00" + junk)


def forge(record: Record, offset: int, value: bytes) -> bytes:
    """A packed record with a changed header field and checksums made to fit, as an attacker would."""
    packed = bytearray(pack(record))
    packed[offset : offset + len(value)] = value
    packed[HEADER_BYTES - 16 : HEADER_BYTES - 8] = struct.pack("<Q", xxhash.xxh3_64_intdigest(packed[HEADER_BYTES:]))
    packed[HEADER_BYTES - 8 : HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(packed[: HEADER_BYTES - 8]))
    return bytes(packed)


def test_forged_counts_with_right_checksums_are_refused(make_record, same):
    record = make_record(1, num_states=3, text="text")
    assert same(unpack(forge(record, 0, b"PRST")), record)  # the forgery itself is sound
    huge = struct.pack("<I", 2**32 - 1)
    # compression_ratio, num_states, num_tokens, code_size, num_windows, text_bytes
    for offset in range(8, 32, 4):
        for value in (huge, bytes(4)):
            with pytest.raises(DamagedRecord):
                unpack(forge(record, offset, value))
    with pytest.raises(DamagedRecord, match="add up"):
        unpack(forge(record, HEADER_BYTES, struct.pack("<I", 4)))  # window_tokens
    with pytest.raises(DamagedRecord, match="UTF-8"):
        unpack(forge(record, record.size_bytes - 4, b"\xff\xff\xff\xff"))
    with pytest.raises(DamagedRecord, match="version 2 is unknown, expected 1"):
        unpack(forge(record, 4, b"\x02\x00"))


def test_a_record_that_does_not_fit_itself_cannot_be_built():
    codes = np.zeros((3, 4), dtype=np.uint8)
    values = {
        "window_tokens": (12,), "compression_ratio": 4, "truncated": False, "text_digest": bytes(32),
        "manifest_checksum": 0,
    }  # fmt: skip
    Record.build(codes, **values)
    for wrong in ({"window_tokens": (13,)}, {"compression_ratio": 6}, {"text_digest": b""}):
        with pytest.raises(ValueError, match=r"codes|text_digest"):
            Record.build(codes, **(values | wrong))
    with pytest.raises(ValueError, match="float32"):
        Record.build(codes.astype(np.float32), **values)
    with pytest.raises(ValueError, match="not empty"):
        Record.build(codes[:0], **values)


def test_codes_of_an_unpacked_record_are_a_view(make_record):
    packed = pack(make_record(1))
    record = unpack(packed)
    assert np.shares_memory(record.codes, np.frombuffer(packed, dtype=np.uint8))
    assert not record.codes.flags.writeable
