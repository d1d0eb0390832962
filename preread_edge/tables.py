"""Tables and paragraphs for people: as wide as the terminal, and whole where a stream is a file or a pipe.

A number is never cut or wrapped; texts give way. Where the numbers alone are too wide, columns go into several tables
that repeat the keys of the rows, or else each row becomes a block of lines.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import IO, TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text

_GAP = "  "
_MIN_TEXT, _MAX_WORD = 20, 24  # of a column of texts; a word with a digit in it is not broken, up to so many columns
_NO_SIZE = 80  # columns of a terminal that does not tell

Cell = str | tuple[str, str]  # a text, or a text and its style


class Kind(Enum):
    """How the cells of a column give way."""

    NUMBER = "not at all, aligned right"
    WHOLE = "not at all"
    TEXT = "they wrap"
    LINE = "they are cut to one line, with … at its end"


NUMBER, WHOLE, TEXT, LINE = Kind


@dataclass(frozen=True)
class Column:
    """A column of a table; one without a name has no heading."""

    name: str = ""
    kind: Kind = NUMBER
    usual: int = 0  # columns of the terminal that it takes where there is room, so that tables below each other agree

    def least(self, cells: Sequence[Text], natural: int) -> int:
        """Columns of the terminal that it cannot do without."""
        widest = max((cell.cell_len for cell in cells), default=0)
        if self.kind in (NUMBER, WHOLE):
            return max(widest, len(self.name))
        words = (len(word) for cell in cells for word in cell.plain.split() if re.search(r"\d", word))
        longest = max((n for n in words if n <= _MAX_WORD), default=0) if self.kind is TEXT else 0
        return min(natural, max(_MIN_TEXT, len(self.name), longest))


@dataclass
class Table:
    """Rows under headings; the first `num_keys` columns tell one row from another."""

    columns: Sequence[Column]
    num_keys: int = 1
    indent: int = 0
    rows: list[tuple[list[Text], str]] = field(default_factory=list)  # cells, and the style of the row

    @classmethod
    def facts(cls, values: Mapping[str, Cell]) -> Table:
        """Names and their values, empty ones left out."""
        table = cls([Column(kind=WHOLE), Column(kind=TEXT)])
        for name, value in values.items():
            if value:
                table.add(name, value)
        return table

    def add(self, *cells: Cell, style: str = "") -> None:
        texts = [_text(cell) for cell in cells]
        for text in texts:
            text.plain = re.sub(r"\s", " ", text.plain)  # a line break would end the row
        self.rows.append((texts, style))

    def lines(self, width: int | None) -> Iterator[Text]:
        """The table on a terminal of `width` columns; None: as wide as it is."""
        margin = _text(" " * self.indent)
        for line in self._lines(width and width - self.indent):
            yield margin + line if line else line

    def _lines(self, width: int | None) -> Iterator[Text]:
        numbers = range(len(self.columns))
        keys = list(numbers[: self.num_keys])
        if width is None or self._least(numbers) <= width:
            yield from self._table(list(numbers), width)
            return
        if any(self._least([*keys, i]) > width for i in numbers[self.num_keys :]):
            yield from self._blocks(width)
            return
        part = keys[:]
        for i in numbers[self.num_keys :]:
            if len(part) > len(keys) and self._least([*part, i]) > width:
                yield from self._table(part, width)
                yield _text("")
                part = keys[:]
            part.append(i)
        yield from self._table(part, width)

    def _cells(self, i: int) -> list[Text]:
        return [cells[i] for cells, _ in self.rows]

    def _natural(self, i: int) -> int:
        return max(len(self.columns[i].name), self.columns[i].usual, *(cell.cell_len for cell in self._cells(i)))

    def _least(self, numbers: Iterable[int]) -> int:
        widths = [self.columns[i].least(self._cells(i), self._natural(i)) for i in numbers]
        return sum(widths) + len(_GAP) * (len(widths) - 1)

    def _table(self, numbers: list[int], width: int | None) -> Iterator[Text]:
        widths = [self._natural(i) for i in numbers]
        least = [self.columns[i].least(self._cells(i), natural) for i, natural in zip(numbers, widths, strict=True)]
        room = sum(widths) if width is None else max(sum(least), width - len(_GAP) * (len(widths) - 1))
        while sum(widths) > room:  # the widest that can gives way
            at = max((at for at, one in enumerate(widths) if one > least[at]), key=widths.__getitem__)
            widths[at] -= 1
        columns = [self.columns[i] for i in numbers]
        if any(column.name for column in columns):
            yield from _row([_text((column.name, "bold")) for column in columns], columns, widths)
        for cells, style in self.rows:
            for line in _row([cells[i] for i in numbers], columns, widths):
                line.stylize_before(style)
                yield line

    def _blocks(self, width: int) -> Iterator[Text]:
        """The keys on a line, under it every other cell next to its column's name."""
        others = self.columns[self.num_keys :]
        longest = max(len(column.name) for column in others)
        for number, (cells, _) in enumerate(self.rows):
            if number and longest:
                yield _text("")
            keys = []
            for column, cell in zip(self.columns, cells[: self.num_keys], strict=False):
                name = f"{column.name} " if column.name and self.num_keys > 1 else ""
                keys += [_text(name) + cell] if cell.plain.strip() else []
            title = _text(_GAP).join(keys)
            title.stylize_before("bold")
            yield from _wrapped(title, width)
            for column, cell in zip(others, cells[self.num_keys :], strict=True):
                if cell.plain.strip():
                    yield from _fact(column, cell, longest, width)


def print_parts(*parts: Cell | Table, err: bool = False) -> None:
    """Paragraphs and tables on standard output, or standard error; on a terminal no line is longer than it is wide."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    console, width = Console(file=stream), terminal_width(stream)
    with console.capture() as captured:
        for part in parts:
            for line in part.lines(width) if isinstance(part, Table) else paragraph(part, width):
                console.print(line, soft_wrap=True)
    # click finds the stream, and writes UTF-8 to one that claims ASCII; but not past one that keeps clear of a bar.
    click.echo(captured.get(), None if isinstance(stream, io.TextIOWrapper) else stream, nl=False, err=err)


def print_tables(tables: Iterable[Table]) -> None:
    """One below the other, with an empty line between."""
    for number, table in enumerate(tables):
        print_parts(*[""] * (number > 0), table)


def paragraph(text: Cell, width: int | None) -> Iterator[Text]:
    """Its lines, each wrapped between words, and indented as it begins."""
    whole = _text(text)
    whole.expand_tabs(8)
    for line in whole.split("\n", allow_blank=True):
        indent = len(line.plain) - len(line.plain.lstrip(" "))
        if width is None or line.cell_len <= width:
            yield line
            continue
        for wrapped in _wrapped(line[indent:], width - indent):
            yield _text(" " * indent) + wrapped


def human_seconds(seconds: float) -> str:
    """9 -> 9.0 s, 42 -> 42 s, 75 -> 1 min 15 s, 4500 -> 1 h 15 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def terminal_width(stream: IO[str]) -> int | None:
    """Columns of the terminal behind a stream; None: a file or a pipe, whose lines may have any length."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or _NO_SIZE
    except (OSError, ValueError):
        return _NO_SIZE


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text(cell) if isinstance(cell, str) else Text(*cell)


def _wrapped(text: Text, width: int) -> list[Text]:
    from rich.console import Console

    lines = list(text.wrap(Console(), max(1, width), overflow="fold"))
    for line in lines:
        line.rstrip()
    return lines


def _fact(column: Column, cell: Text, name_width: int, width: int) -> Iterator[Text]:
    """A cell of a block, next to its column's name or, where that is too wide, under it."""
    cell = cell.copy()
    cell.rstrip()
    name = f"{_GAP}{column.name:<{name_width}}{_GAP if name_width else ''}"
    if len(name) + cell.cell_len <= width:
        yield _text(name) + cell
        return
    if column.name:
        yield _text(_GAP + column.name)
    kind = column.kind if column.kind in (TEXT, LINE) else WHOLE
    room = width - len(_GAP) if kind is not WHOLE else cell.cell_len
    for line in _row([cell], [Column(kind=kind)], [room]):
        yield _text(_GAP) + line


def _row(cells: Sequence[Text], columns: Sequence[Column], widths: Sequence[int]) -> Iterator[Text]:
    """One row as lines: as many as its longest cell wraps to."""
    wrapped = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        if column.kind is LINE:
            cell = cell.copy()
            cell.truncate(width, overflow="ellipsis")
        wrapped.append([cell] if cell.cell_len <= width else _wrapped(cell, width))
    for number in range(max(map(len, wrapped))):
        line = _text("")
        for lines, column, width in zip(wrapped, columns, widths, strict=True):
            cell = lines[number] if number < len(lines) else _text("")
            space = " " * (width - cell.cell_len)
            line += _text(space) + cell if column.kind is NUMBER else cell + _text(space)
            line += _text(_GAP)
        line.rstrip()
        yield line
