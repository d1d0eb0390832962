"""Rows of CSV and TSV, and which of their columns are the id and the text."""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from encoder_worker.sources import (
    Columns,
    Fields,
    Item,
    Line,
    Place,
    Reason,
    Refused,
    SourceError,
    decoded,
    show_names,
)  # fmt: skip

Row = tuple[Place, list[str]] | Refused
# Names that other collections give to the two columns: a first line with one of them is a header.
_IDS = frozenset(
    (
        *("asin", "corpus_id", "did", "doc_id", "docid", "docno", "document_id", "documentid", "guid", "identifier"),
        *("idx", "index", "item_id", "key", "nr", "number", "passage_id", "passageid", "pid", "product_id"),
        *("record_id", "row_id", "sku", "uid", "uri", "url", "uuid"),
    )
)
_TEXTS = frozenset(
    (
        *("abstract", "answer", "article", "body", "chunk", "content", "contents", "description", "doc", "document"),
        *("full_text", "message", "page_content", "paragraph", "passage", "passage_text", "passages", "review"),
        *("segment", "sentence", "snippet", "summary", "texts", "txt"),
    )
)
_WORD = re.compile(r"[^\W\d](?:[^\W\d]|[-_.])*")  # one word of letters, as a column is named
_WHOLE = re.compile(r"(-?\d+)\.0")  # as pandas writes a whole number out of a column of doubles
SEPARATORS = ",;\t"  # of CSV


def table_passages(
    rows: Iterator[Row],
    source: str,
    fields: Fields,
    on_columns: Callable[[Columns], None],
    separator: str | None = None,
) -> Iterator[Item]:
    """Passages of records. The first one is a header when it names the columns, else data: an id and a text.

    The `separator` of CSV is told to `on_columns` where it is no comma; None: TSV.
    """
    first: Row | None
    while isinstance(first := next(rows, None), Refused):
        yield first
    if first is None:
        return
    cells, second = first[1], next(rows, None)
    following = None if second is None or isinstance(second, Refused) else second[1]
    marks = "tab" if separator is None else "comma, semicolon or tab"
    if len(cells) == 1:
        raise SourceError(f"{source}: the first line has no {marks}; expected columns that one separates")
    columns = _choose_columns(source, cells, following, fields)
    if separator not in (None, ","):
        columns = replace(columns, separator=separator)
    on_columns(columns)
    names = [name for name in (columns.id, columns.text, columns.title) if name is not None]
    positions = [name - 1 if isinstance(name, int) else cells.index(name) for name in names]
    data = [second] if second is not None else []
    for row in chain(data if isinstance(columns.id, str) else [first, *data], rows):
        if isinstance(row, Refused):
            yield row
        elif len(row[1]) == len(cells):
            passage_id, *texts = (row[1][position] for position in positions)
            whole = _WHOLE.fullmatch(passage_id)
            yield fields.passage(row[0], whole[1] if whole else passage_id, *texts)
        else:  # a separator inside the text would otherwise cut it in silence
            yield Refused(row[0], None, Reason.BROKEN_ROW, f"{len(row[1])} columns; expected {len(cells)}")


def _choose_columns(source: str, cells: list[str], following: list[str] | None, fields: Fields) -> Columns:
    """By the names in the first line, or without any the first two columns. SourceError where neither is sure."""
    line = f"the first line ({show_names(cells)})"
    if fields.has_header is False:
        return _numbered(source, len(cells), fields)
    try:
        return Columns(source, *fields.find(cells))
    except KeyError as exc:
        missing = exc.args[0]
    if fields.id is not None or fields.text is not None or fields.has_header or len(cells) != 2:
        raise SourceError(f"{source}: {missing} among the {len(cells)} columns of {line}; {fields.advice}")
    if _is_header(cells, following, fields):
        raise SourceError(f"{source}: {line} looks like a header and has {missing}; {fields.advice}")
    return Columns(source, 1, 2)


def _is_header(cells: list[str], following: list[str] | None, fields: Fields) -> bool:
    """Whether the first of two-column lines names its columns: one name is known, or both are single words of letters
    and the text below is more than one word.
    """
    names = [re.sub(r"[\s-]+", "_", cell.strip().casefold()) for cell in cells]
    if any(name in _IDS or name in fields.id_names for name in names):
        return True
    if any(name in _TEXTS or name == fields.text_name for name in names) and not any(map(str.isdecimal, cells)):
        return True
    words = all(_WORD.fullmatch(cell.strip()) for cell in cells)
    return words and following is not None and len(following) == 2 and len(following[1].split()) > 1


def _numbered(source: str, num_columns: int, fields: Fields) -> Columns:
    title = None if fields.title == Fields.title else fields.title
    given = {"id": fields.id or "1", "text": fields.text or "2"} | ({"title": title} if title is not None else {})
    for field, number in given.items():
        if not (number.isdecimal() and 1 <= int(number) <= num_columns):
            expected = f"1 to {num_columns}, the number of a column, because there is no header"
            raise SourceError(f"{source}: the {field} column is {number!r}; expected {expected}")
    numbers = {field: int(number) for field, number in given.items()}
    return Columns(source, numbers["id"], numbers["text"], numbers.get("title"))


def separator_of(first_line: str) -> str:
    """Of a CSV file: of comma, semicolon and tab the one that comes first in its first line, outside quotes."""
    return next((mark for mark in re.sub(r'"[^"]*"', "", first_line) if mark in SEPARATORS), ",")


def csv_rows(entries: Iterator[Line], max_bytes: int, separator: str) -> Iterator[Row]:
    """Records, each at most `max_bytes` however many lines it spans: by RFC 4180 a quoted field may hold the separator,
    quotes and line ends.

    A quote that nothing closes costs the line it stands in, not the rest of the file: the next lines are read again.
    """
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))  # a setting of the process; only ever raised
    again: deque[Line] = deque()
    taken: list[Line] = []  # for the record in hand

    def feed() -> Iterator[str]:
        num_bytes = 0
        while (entry := again.popleft() if again else next(entries, None)) is not None:
            taken.append(entry)
            if isinstance(entry, Refused):
                raise csv.Error(f"a quote is not closed before line {entry.place.line}, which cannot be read")
            num_bytes += len(entry[1])
            if num_bytes > max_bytes:
                raise csv.Error(f"a quote is not closed within {max_bytes:,} bytes")
            text = decoded(entry)
            if isinstance(text, Refused):
                raise csv.Error(f"a quote is not closed before line {text.place.line}, which is not UTF-8")
            yield text[1] + "\n"

    while True:
        taken.clear()
        try:
            cells = next(csv.reader(feed(), delimiter=separator, strict=True))
        except StopIteration:
            return
        except csv.Error as exc:
            again.extendleft(reversed(taken[1:]))
            first = decoded(taken[0])
            yield first if isinstance(first, Refused) else Refused(first[0], None, Reason.BROKEN_ROW, f"not CSV: {exc}")
            continue
        if cells:  # a blank line is a record without cells
            assert not isinstance(taken[0], Refused)
            yield taken[0][0], cells
