"""The byte form of a record: what was packed comes back, and nothing else is accepted."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DamagedRecord
from cache.record import HEADER_BYTES, RECORD_VERSION, Header, Record

ID = "a passage"
# One that version 1 wrote: 3 states of 16 bytes, 9 tokens at ratio 4, truncated, the text "é", under manifest 77.
VERSION_1 = bytes.fromhex(
    "5052535401000300040000000300000009000000100000000100000002000000000102030405060708090a0b0c0d0e0f10111213141516"
    "1718191a1b1c1d1e1f4d00000000000000d83ac4209f2f87fec4caf4f66617baa709000000000102030405060708090a0b0c0d0e0f1011"
    "12131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2fc3a9"
)
IDS = st.text(st.characters(codec="utf-8"), max_size=20)


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
        binding=draw(st.integers(0, 2**64 - 1)),
        num_clipped=draw(st.integers(0, 9)),
        text=draw(st.none() | st.text(max_size=20)),
    )


@given(records(), IDS)
def test_unpacking_gives_what_was_packed(same, record, passage_id):
    packed = record.pack(passage_id)
    assert len(packed) == record.header.total_bytes
    assert same(Record.unpack(packed, passage_id), record)
    assert Header.parse(packed[:HEADER_BYTES], passage_id) == record.header


@given(records(), st.data())
def test_any_flipped_bit_is_found(record, data):
    packed = bytearray(record.pack(ID))
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedRecord):
        Record.unpack(bytes(packed), ID)


@given(records(), st.data())
def test_any_other_length_is_found(record, data):
    packed = record.pack(ID)
    with pytest.raises(DamagedRecord):
        Record.unpack(packed[: data.draw(st.integers(0, len(packed) - 1))], ID)
    with pytest.raises(DamagedRecord, match="expected"):
        Record.unpack(packed + data.draw(st.binary(min_size=1, max_size=8)), ID)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(junk):
    with pytest.raises(DamagedRecord):
        Record.unpack(junk, ID)
    with pytest.raises(DamagedRecord):
        Record.unpack(b"PRST\x01\x00" + junk, ID)
    with pytest.raises(DamagedRecord):
        Record.unpack(b"PRST\x02\x00" + junk, ID)


def forge(record: Record, offset: int, value: bytes) -> bytes:
    """A packed record with a changed header field and checksums made to fit, as an attacker would."""
    packed = bytearray(record.pack(ID))
    packed[offset : offset + len(value)] = value
    packed[HEADER_BYTES - 16 : HEADER_BYTES - 8] = struct.pack("<Q", xxhash.xxh3_64_intdigest(packed[HEADER_BYTES:]))
    covered = bytes(packed[: HEADER_BYTES - 8]) + ID.encode()
    packed[HEADER_BYTES - 8 : HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(covered))
    return bytes(packed)


def test_forged_counts_with_right_checksums_are_refused(make_record, same):
    record = make_record(1, num_states=3, text="text")
    assert same(Record.unpack(forge(record, 0, b"PRST"), ID), record)  # the forgery itself is sound
    huge = struct.pack("<I", 2**32 - 1)
    # compression_ratio, num_states, num_tokens, code_size, num_windows, text_bytes
    for offset in range(8, 32, 4):
        for value in (huge, bytes(4)):
            with pytest.raises(DamagedRecord):
                Record.unpack(forge(record, offset, value), ID)
    with pytest.raises(DamagedRecord, match="add up"):
        Record.unpack(forge(record, HEADER_BYTES, struct.pack("<I", 4)), ID)  # window_tokens
    with pytest.raises(DamagedRecord, match="UTF-8"):
        Record.unpack(forge(record, record.header.total_bytes - 4, b"\xff\xff\xff\xff"), ID)
    with pytest.raises(DamagedRecord, match="version 3 is unknown, expected 1 or 2"):
        Record.unpack(forge(record, 4, b"\x03\x00"), ID)


def test_a_record_that_does_not_fit_itself_cannot_be_built():
    codes = np.zeros((3, 4), dtype=np.uint8)
    values = {
        "window_tokens": (12,), "compression_ratio": 4, "truncated": False, "text_digest": bytes(32),
        "binding": 0,
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
    packed = make_record(1).pack(ID)
    record = Record.unpack(packed, ID)
    assert np.shares_memory(record.codes, np.frombuffer(packed, dtype=np.uint8))
    assert not record.codes.flags.writeable


@given(records(), IDS, IDS)
def test_a_record_is_read_under_its_own_id_only(record, own, other):
    packed = record.pack(own)
    if own != other:
        with pytest.raises(DamagedRecord, match="another passage's"):
            Record.unpack(packed, other)
        with pytest.raises(DamagedRecord, match="another passage's"):
            Header.parse(packed[:HEADER_BYTES], other)
    # What is computed of the payload can serve under any id: its checksum does not know one.
    other_header = Header.parse(record.pack(other)[:HEADER_BYTES], other)
    assert other_header.payload_checksum == record.header.payload_checksum


def test_version_1_is_read_and_written_again_as_the_latest(same):
    for passage_id in (ID, "of any id: it does not know its own"):
        record = Record.unpack(VERSION_1, passage_id)
        assert record.header.version == 1
        assert np.array_equal(record.codes, np.arange(48, dtype=np.uint8).reshape(3, 16))
        assert (record.window_tokens, record.text, record.header.truncated) == ((9,), "é", True)
        assert (record.header.binding, record.header.num_clipped) == (77, 0)
    written = Record.build(
        record.codes, window_tokens=(9,), compression_ratio=4, truncated=True, text_digest=bytes(range(32)), binding=77,
        text="é", version=1,
    )  # fmt: skip
    assert written.pack(ID) == VERSION_1
    latest = replace(record, header=record.header.latest())
    again = Record.unpack(latest.pack(ID), ID)
    assert again.header.version == RECORD_VERSION
    assert same(again, latest)
    assert again.header.payload_checksum == record.header.payload_checksum
    with pytest.raises(DamagedRecord, match="another passage's"):
        Record.unpack(latest.pack(ID), "other")


@given(st.data())
def test_any_flipped_bit_of_version_1_is_found(data):
    packed = bytearray(VERSION_1)
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedRecord):
        Record.unpack(bytes(packed), ID)
