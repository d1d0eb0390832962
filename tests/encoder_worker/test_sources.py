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
    broken = write(tmp_path / "p.parquet", b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    for names, options, expected in [
        ([], {}, "no input"),
        ([tmp_path / "gone.jsonl"], {}, "no such file"),
        ([unknown], {}, "does not tell the format"),
        ([unknown], {"format": "xml"}, "format is 'xml'"),
        (["-"], {}, "standard input has no name"),
        ([tmp_path / "empty"], {}, "without corpus.jsonl"),
        ([broken], {}, "cannot be read as Parquet"),
    ]:
        with pytest.raises(SourceError, match=expected):
            read(*names, **options)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("p.csv", "\ufeffid,text\n1,x\n".encode("utf-16"), "UTF-16"),
        ("p.tsv", "id\ttext\n1\tx\n".encode("utf-16-le"), "UTF-16"),
        ("p.csv", b"PK\x03\x04rest of a workbook", "Excel workbook"),
        ("p.xlsx", b"PK\x03\x04rest of a workbook", "Excel workbook"),
        ("p.jsonl.bz2", b"BZh91AY", "bzip2"),
        ("p.feather", b"ARROW1\0\0", "Feather"),
        ("p.jsonl", b"PAR1\x15\x04", "Parquet"),
        ("p.json", b'\xef\xbb\xbf [{"id": 1, "text": "x"}]', "a JSON array; expected one object per line"),
        ("p.json", b'{\n  "id": 1,\n  "text": "x"\n}\n', "JSON over several lines"),
        ("p.csv", b"id,text\r1,x\r", "CR ends its lines"),
        ("p.csv", b"only one column\n", "no comma, semicolon or tab"),
        ("p.tsv", b"id,text\n1,x\n", "no tab"),
    ],
)
def test_another_kind_of_file_is_named_for_what_it_is(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        read(write(tmp_path / name, data))
    if not data.startswith(b"BZh"):
        with pytest.raises(SourceError, match=expected):
            read(write(tmp_path / f"{name}.gz", gzip.compress(data)))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("p.csv", "docid,content"),
        ("p.csv", "Document ID,Full-Text"),
        ("p.tsv", "pid\tpassage"),
        ("p.csv", "id,inhalt"),
        ("p.csv", "schluessel,Beschreibung"),  # nobody knows it: two words, above a text
        ("p.csv", "docid,url,content"),
        ("p.csv", ",text"),  # pandas' index
        ("p.csv", "text,ID,TEXT,Text,id,title,Id,id"),  # two columns of one name
    ],
)
def test_a_header_is_no_passage(tmp_path: Path, name: str, header: str) -> None:
    mark = "\t" if name.endswith("tsv") else ","
    row = mark.join(f"{i} some words" for i in range(header.count(mark) + 1))
    path = write(tmp_path / name, f"{header}\n{row}\n".encode())
    with pytest.raises(SourceError, match="the first line"):
        read(path)
    items = read(path, fields=Fields(text="2", has_header=False))
    last = items[-1]
    assert isinstance(last, SourcePassage)
    assert (last.text, last.place.line, len(items)) == ("1 some words", 2, 2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"1,hello\n2,more than a word\n", [("1", "hello"), ("2", "more than a word")]),
        (b"a,apple\nb,banana\n", [("a", "apple"), ("b", "banana")]),
        (b"doc7,content\ndoc8,other\n", None),  # as near as a passage may come to a header
        (b"7,content\n8,some other content\n", [("7", "content"), ("8", "some other content")]),
        (b"7;Hello, world\n8;again\n", [("7", "Hello, world"), ("8", "again")]),
        (b"7,Hello; world\n8,again\n", [("7", "Hello; world"), ("8", "again")]),
        (b'"a,b"\tof quotes\nc\tand tabs\n', [("a,b", "of quotes"), ("c", "and tabs")]),
        (b"1.0,pandas\n2.0,doubles\n1.50,a string\n", [("1", "pandas"), ("2", "doubles"), ("1.50", "a string")]),
    ],
)
def test_two_columns_without_a_header(tmp_path: Path, data: bytes, expected: list[tuple[str, str]] | None) -> None:
    source = Source([write(tmp_path / "p.csv", data)])
    if expected is None:
        with pytest.raises(SourceError, match="looks like a header"):
            list(source)
        return
    assert texts(list(source)) == expected
    assert "no header: column 1 is the id, column 2 the text" in str(source.columns[0])


@pytest.mark.parametrize(
    ("data", "fields", "expected"),
    [
        (b"ID,Text ,Title\r\n1,b,h\r\n", Fields(), "columns ID, Text , Title (before the text)"),
        (
            b"docid;Content;x\n1;b;y\n",
            Fields(id="DocID", text="content"),
            "semicolons separate; columns docid, Content",
        ),
        (b"text,TEXT,id\nb,x,1\n", Fields(), "columns id, text"),  # as it is written comes first
        (b",text\n1,b\n", Fields(id=""), "columns (unnamed), text"),
        (b"1,u,h,b\n", Fields(text="4", title="3", has_header=False), "column 4 the text, column 3 the title"),
    ],
)
def test_the_columns_taken_are_told(tmp_path: Path, data: bytes, fields: Fields, expected: str) -> None:
    told: list[object] = []
    source = Source([path := write(tmp_path / "p.csv", data)], fields=fields, on_columns=told.append)
    (item,) = texts(list(source))
    assert item[0] == "1"
    assert item[1].endswith("b")
    assert told == source.columns
    assert str(told[0]).startswith(f"{path}: ")
    assert str(told[0]).endswith(expected)


def test_numbers_of_columns_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", b"1,u,b\n")
    with pytest.raises(SourceError, match="the text column is '4'; expected 1 to 3"):
        read(path, fields=Fields(text="4", has_header=False))
    with pytest.raises(SourceError, match="the id column is 'docid'; expected 1 to 3"):
        read(path, fields=Fields(id="docid", has_header=False))


def test_fields_of_json_are_found_without_case(tmp_path: Path) -> None:
    lines = b'{"ID": 1, "Text": "one"}\n{"Id": 2, "text": "two"}\n{"docid": 3, "body": "x"}\n'
    lines += b'{"ID": 4, "Id": 5, "text": "x"}\n'
    items = read(write(tmp_path / "p.jsonl", lines), fields=Fields(advice="name them"))
    assert texts([item for item in items if isinstance(item, SourcePassage)]) == [("1", "one"), ("2", "two")]
    assert [item.message for item in items if isinstance(item, Refused)] == [
        "no id or _id and no text; found docid, body; name them",
        "ID and Id: which one is unclear; found ID, Id, text; name them",
    ]


def test_whole_numbers_are_ids_whatever_holds_them(tmp_path: Path) -> None:
    rows = ["1.0", "-2.0", "3e2", "1.5", "NaN", "1e16", "true"]
    lines = "".join(f'{{"id": {value}, "text": "t"}}\n' for value in rows)
    items = read(write(tmp_path / "p.jsonl", lines.encode()))
    assert [i.passage_id for i in items if isinstance(i, SourcePassage)] == ["1", "-2", "300"]
    reasons = [i.message for i in items if isinstance(i, Refused)]
    assert [why.partition(";")[0] for why in reasons] == [
        "id is the number 1.5",
        "id is NaN, which stands for a missing value",
        "id is the number 1e+16, which a double does not hold exactly",
        "id is bool True",
    ]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1.0, 2.0, float("nan")]), ["1", "2"]),
        (pa.array([1, 2, None], pa.decimal128(20, 2)), ["1", "2"]),
        (pa.array([2**64 - 1, 2, None], pa.uint64()), [str(2**64 - 1), "2"]),
        (pa.array(["a", "b", None], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b", None], pa.string_view()), ["a", "b"]),
        (pa.array([b"a", b"b", None], pa.binary()), ["a", "b"]),
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b"]),
        (pa.array([True, False, None]), "holds bool; expected strings or whole numbers"),
        (pa.array([["a"], ["b"], None]), "holds list"),
    ],
)
def test_parquet_columns_of_every_type(tmp_path: Path, ids: pa.Array, expected: list[str] | str) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"ID": ids, "Text": pa.array(["x", "y", "z"])}), path)
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            read(path)
        return
    source = Source([path])
    items = list(source)
    assert [i.passage_id for i in items if isinstance(i, SourcePassage)] == expected
    assert refusals(items) == [(3, Reason.WRONG_TYPE)]
    assert str(source.columns[0]) == f"{path}: columns ID, Text"


@pytest.mark.parametrize("text", [pa.array([1]), pa.array([["x"]]), pa.array([1.5])])
def test_a_parquet_text_that_is_none_ends_the_file_once(tmp_path: Path, text: pa.Array) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": text}), tmp_path / "p.parquet")
    with pytest.raises(SourceError, match=r"column text holds .*; expected strings$"):
        read(tmp_path / "p.parquet")
