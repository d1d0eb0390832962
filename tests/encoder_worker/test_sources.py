"""Laws of sources: every item comes out, as a passage or as a refusal with its line; memory is bounded."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from encoder_worker.sources import Fields, Reason, Refused, SourceError, SourcePassage
from encoder_worker.sources.files import Source

ROWS = [("a", "One", "first text"), ("b", "", "zweiter Text, mit Komma"), ("c", "Three", 'a "quoted"\tword')]
JOINED = [("a", "One first text"), ("b", "zweiter Text, mit Komma"), ("c", 'Three a "quoted"\tword')]


def read(*names: Path | str, **options: object) -> list[SourcePassage | Refused]:
    return list(Source(names, **options))


def texts(items: list[SourcePassage | Refused]) -> list[tuple[str, str]]:
    assert all(isinstance(item, SourcePassage) for item in items), items
    return [(item.passage_id, item.text) for item in items]


def refusals(items: list[SourcePassage | Refused]) -> list[tuple[int, Reason]]:
    return [(item.place.line, item.reason) for item in items if isinstance(item, Refused)]


def jsonl_bytes() -> bytes:
    return "".join(json.dumps({"_id": i, "title": t, "text": x}) + "\n" for i, t, x in ROWS).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def make(tmp_path: Path, name: str) -> Path:
    """The same three passages in the format the name tells."""
    path = tmp_path / name
    if name == "beir":
        path.mkdir()
        write(path / "corpus.jsonl.gz", gzip.compress(jsonl_bytes()))
    elif name.endswith(".csv"):
        with path.open("w", newline="") as out:
            csv.writer(out).writerows([("id", "title", "text"), *ROWS])
    elif name.endswith(".parquet"):
        ids, titles, bodies = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"text": bodies, "id": ids, "title": titles, "other": [1, 2, 3]}), path)
    else:
        data = jsonl_bytes()
        data = gzip.compress(data) if name.endswith(".gz") else data
        data = zstandard.ZstdCompressor().compress(data) if name.endswith(".zst") else data
        write(path, data)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.jsonl.gz", "p.jsonl.zst", "p.csv", "p.parquet", "beir"])
def test_every_format_gives_the_same_passages(tmp_path: Path, name: str) -> None:
    source = Source([make(tmp_path, name)])
    assert texts(list(source)) == JOINED
    assert source.fraction() == 1.0


def test_tsv_without_a_header_is_id_and_text_and_knows_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "collection.tsv", b'0\tsays "hello\n1\ta 5" pipe\r\n2\tone\ttab too many\n3\tlast')
    items = read(path)
    assert texts([item for item in items if isinstance(item, SourcePassage)]) == [
        ("0", 'says "hello'), ("1", 'a 5" pipe'), ("3", "last"),
    ]  # fmt: skip
    assert refusals(items) == [(3, Reason.BROKEN_ROW)]


def test_tsv_with_a_header_finds_columns_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "psgs.tsv", b"id\ttext\ttitle\n1\tbody\thead\n")
    assert texts(read(path)) == [("1", "head body")]


def test_csv_fields_span_lines_and_a_lost_quote_costs_its_own_line(tmp_path: Path) -> None:
    data = b'id,text\n1,"two\nlines, ""quoted"""\n2,"lost\n3,kept\n4,also kept\n5,"never closed\n6,last\n'
    items = read(write(tmp_path / "p.csv", data))
    assert texts([item for item in items if isinstance(item, SourcePassage)]) == [
        ("1", 'two\nlines, "quoted"'), ("3", "kept"), ("4", "also kept"), ("6", "last"),
    ]  # fmt: skip
    assert refusals(items) == [(4, Reason.BROKEN_ROW), (7, Reason.BROKEN_ROW)]


def test_plain_text_is_numbered_by_line(tmp_path: Path) -> None:
    one = write(tmp_path / "one.txt", "first\n\nthird é\n".encode())
    items = read(one)
    assert [(i.passage_id, i.text) for i in items if isinstance(i, SourcePassage)] == [("1", "first"), ("3", "third é")]
    assert refusals(items) == [(2, Reason.EMPTY_TEXT)]
    two = write(tmp_path / "two.txt", b"more\n")
    assert [i.passage_id for i in read(one, two) if isinstance(i, SourcePassage)] == [
        "one.txt:1",
        "one.txt:3",
        "two.txt:1",
    ]


def test_hostile_lines_are_refused_each_with_its_number_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"id": "good", "text": "after a byte order mark"}',
        b'{"id": "x", "text": ',
        b'{"id": "x", "text": "\xff\xfe"}',
        b'["id", "text"]',
        b"",
        b'{"id": "x"}',
        b'{"text": "no id"}',
        b'{"id": "x", "text": "   "}',
        b'{"id": "x", "text": null}',
        b'{"id": true, "text": "t"}',
        b'{"id": "", "text": "t"}',
        b'{"id": "' + b"i" * 600 + b'", "text": "t"}',
        b'{"id": "x", "text": "half a pair \\ud800"}',
        b"[" * 100_000,
        b'{"id": "x", "text": "t", "title": 3}',
        b'{"id": "long", "text": "' + b"y" * 200_000 + b'"}',
        b'{"id": 17, "text": "numbers are ids too", "n": ' + b"9" * 5000 + b"}",
        b'{"id": 18, "text": "last, and without a line end"}',
    ]
    items = read(write(tmp_path / "p.jsonl", b"\n".join(lines)), max_line_bytes=150_000)
    assert [i.passage_id for i in items if isinstance(i, SourcePassage)] == ["good", "18"]
    assert refusals(items) == [
        (2, Reason.BROKEN_JSON), (3, Reason.INVALID_UTF8), (4, Reason.WRONG_TYPE), (6, Reason.MISSING_FIELD),
        (7, Reason.MISSING_FIELD), (8, Reason.EMPTY_TEXT), (9, Reason.WRONG_TYPE), (10, Reason.WRONG_TYPE),
        (11, Reason.BAD_ID), (12, Reason.BAD_ID), (13, Reason.INVALID_UTF8), (14, Reason.BROKEN_JSON),
        (15, Reason.WRONG_TYPE), (16, Reason.LINE_TOO_LONG), (17, Reason.BROKEN_JSON),
    ]  # fmt: skip


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_giant_line_is_never_held(tmp_path: Path, compress: object) -> None:
    data = b'{"id": "big", "text": "' + b"z" * (64 << 20) + b'"}\n{"id": "next", "text": "fine"}\n'
    path = write(tmp_path / "p.jsonl", compress(data))
    del data
    tracemalloc.start()
    items = read(path, max_line_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusals(items) == [(1, Reason.LINE_TOO_LONG)]
    assert isinstance(items[1], SourcePassage)
    assert peak < 8 << 20


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst"])
def test_compressed_data_that_ends_early_is_an_error_after_what_was_whole(tmp_path: Path, name: str) -> None:
    noise = [json.dumps({"id": str(i), "text": f"{i * 7919 % 10007} {i * 104729 % 99991}"}) for i in range(20_000)]
    data = "\n".join(noise).encode()
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.ZstdCompressor().compress(data)
    source = iter(Source([write(tmp_path / name, packed[:-2000])]))
    for _ in range(1000):
        assert isinstance(next(source), SourcePassage)
    with pytest.raises(SourceError, match=r"p\.jsonl"):
        list(source)


def test_parquet_is_read_in_place_or_out_of_a_compressed_copy(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    ids = [f"p{i}" for i in range(5000)]
    pq.write_table(pa.table({"id": ids, "text": ids}), path, row_group_size=1000)
    for name in (path, write(tmp_path / "p.parquet.gz", gzip.compress(path.read_bytes()))):
        source = Source([name])
        items = iter(source)
        read_part = [next(items) for _ in range(2500)]
        assert source.fraction() == pytest.approx(0.5, abs=0.01)
        assert [item.passage_id for item in [*read_part, *items]] == ids
        assert source.fraction() == 1.0


def test_parquet_values_are_checked_one_by_one(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", None, b"", b"dup"], pa.binary()).view(pa.string())
    table = pa.table({"_id": pa.array([1, 2, 3, 4, 5]), "text": raw.dictionary_encode()})
    pq.write_table(table, tmp_path / "p.parquet")
    items = read(tmp_path / "p.parquet")
    assert [i.passage_id for i in items if isinstance(i, SourcePassage)] == ["1", "5"]
    assert refusals(items) == [(2, Reason.INVALID_UTF8), (3, Reason.WRONG_TYPE), (4, Reason.EMPTY_TEXT)]


def test_fields_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", b'{"docno": "d", "body": "b", "title": "t", "headline": "h"}\n')
    fields = Fields(id="docno", text="body", title="headline", title_separator="\n")
    assert texts(read(path, fields=fields)) == [("d", "h\nb")]
    assert texts(read(path, fields=Fields(id="docno", text="body", title=None))) == [("d", "b")]


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    unknown = write(tmp_path / "passages.dat", b"")
    header = write(tmp_path / "p.csv", b"docid,body\n1,x\n")
    three = write(tmp_path / "p.tsv", b"1\tx\ty\n")
    broken = write(tmp_path / "p.parquet", b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    for names, options, expected in [
        ([], {}, "no input"),
        ([tmp_path / "gone.jsonl"], {}, "no such file"),
        ([unknown], {}, "does not tell the format"),
        ([unknown], {"format": "xml"}, "format is 'xml'"),
        (["-"], {}, "standard input has no name"),
        ([tmp_path / "empty"], {}, "without corpus.jsonl"),
        ([header], {"fields": Fields(id="docid")}, "no column text; the header has docid, body"),
        ([three], {}, "3 columns and names none"),
        ([broken], {}, "cannot be read as Parquet"),
    ]:
        with pytest.raises(SourceError, match=expected):
            read(*names, **options)
