"""Lines and rows of judged files, read by the reader of `preread index`. Does not know what they mean.

A line that cannot be used costs itself: it is noted in `refused`, with its place, and the others are read on.

Scores of candidates to one ranking that every tool reads alike. Does not know where scores come from.

Judgements and run files, in the forms the field's tools read and write. Does not know texts or scores' meaning.

Judgements: BEIR's three columns (query, passage, grade) with or without a header line, TREC's four
(query, iteration, passage, grade), or a JSON object a line. Runs: TREC's six (query, Q0, passage, rank, score, tag).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import InvalidName
from cache.record import passage_id_bytes
from encoder_worker.sources import Place, Reason, Refused, SourceError
from encoder_worker.sources.source import STDIN, open_bytes
from encoder_worker.sources.text import DEFAULT_MAX_LINE_BYTES, json_object, read_texts
from preread.types import id_text
from preread_edge.outputs import open_output
from tuning import EvaluationError


def numbered_lines(path: Path, refused: list[Refused] | None = None) -> Iterator[tuple[Place, str]]:
    """Lines that are not blank, without their ends, of a text file, plain, gzip or zstd; `-` is standard input.

    Args:
        refused: takes lines that are too long or not UTF-8; None: the first of them is an error.

    Raises:
        EvaluationError: no such file, or a broken compressed stream.
    """
    try:
        with open_bytes(str(path), sys.stdin.buffer) as (stream, _):
            source = "standard input" if str(path) == STDIN else str(path)
            for entry in read_texts(stream, source, DEFAULT_MAX_LINE_BYTES):
                if isinstance(entry, Refused):
                    refuse(entry, refused)
                else:
                    yield entry
    except SourceError as exc:
        raise EvaluationError(str(exc)) from exc


def json_rows(path: Path, refused: list[Refused] | None = None) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The JSON object of each line, and where it stood.

    Args:
        refused: takes lines that hold no object; None: the first of them is an error.

    Raises:
        EvaluationError: as `numbered_lines`.
    """
    for place, line in numbered_lines(path, refused):
        row = json_object(place, line)
        if isinstance(row, Refused):
            refuse(row, refused)
        else:
            yield place, row


def refuse(item: Refused, refused: list[Refused] | None) -> None:
    """Notes a line that cannot be used.

    Raises:
        EvaluationError: there is nowhere to note it.
    """
    if refused is None:
        raise EvaluationError(str(item))
    refused.append(item)


def nothing_left(path: str | Path, what: str, refused: Sequence[Refused] | None) -> EvaluationError:
    """The error of a file without a line of use; the first refused one says why."""
    why = [str(item) for item in refused or () if item.place.source == str(path)]
    return EvaluationError(
        f"{path}: no {what}" + (f"; {len(why):,} lines refused, the first is {why[0]}" if why else "")
    )


def fields(line: str) -> list[str]:
    """Columns of a judgement or run line: by tabs where it has any, by blanks otherwise."""
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def first_existing(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is a file in `folder`."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


# trec_eval compares scores as float32 and breaks ties by passage id. Neighbours are kept at least this far
# apart, relative to their size: two units in the last place of a float32.
_STEP = 2.0**-22
_LARGEST = 1e38  # below float32's largest number, with room for the steps


def order(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Rows by falling score; equal ones stay in place, rows without a score (NaN) come last."""
    values = np.asarray(scores, dtype=np.float64)
    missing = np.isnan(values)
    return np.lexsort((np.where(missing, 0.0, -values), missing))  # stable, last key first


def rank(candidates: Sequence[str], scores: NDArray[np.floating] | Sequence[float]) -> list[tuple[str, float]]:
    """Candidates by falling score; equal scores stay in candidate order, candidates without a score come last.

    The scores given back fall strictly, even in float32, so that no tool reorders them; they are
    the scores themselves, but where two are equal or nearly so.

    Args:
        scores: (num_candidates,); NaN where there is none.
    """
    values = np.asarray(scores, dtype=np.float64)
    rows = order(values)
    return [
        (candidates[row], score)
        for row, score in zip(
            rows.tolist(), falling(np.nan_to_num(values[rows], posinf=np.inf, neginf=-np.inf)), strict=True
        )
    ]


def falling(scores: Iterable[float]) -> list[float]:
    """Scores of a ranking, best first, made to fall strictly: one that is not below the one before is lowered.

    Read as float32 they still differ. Beyond float32's range none of them could, so there ranks take their place.
    """
    lowered: list[float] = []
    ceiling = np.inf
    for score in scores:
        lowered.append(min(ceiling, float(score)))
        ceiling = lowered[-1] - _STEP * max(1.0, abs(lowered[-1]))
    if lowered and not (lowered[-1] > -_LARGEST and lowered[0] < _LARGEST):
        return [float(-rank) for rank in range(1, len(lowered) + 1)]
    return lowered


GRADE_NAMES = ("score", "grade", "relevance", "rel", "label")  # of the last column, in a header line

# Keys of a JSON line, the first that is there counts.
QUERY_KEYS = ("query-id", "query_id", "qid")
PASSAGE_KEYS = ("corpus-id", "passage_id", "doc_id", "docid", "pid")

Qrels = dict[str, dict[str, int]]  # query_id -> {passage_id: grade}
Judgement = tuple[str, str, int]  # query_id, passage_id, grade
Run = dict[str, list[tuple[str, float]]]  # query_id -> [(passage_id, score)], best first


@dataclass(frozen=True)
class RunFile:
    """A run and the tag of the system that made it."""

    run: Run
    tag: str


def read_qrels(path: Path, refused: list[Refused] | None = None) -> Qrels:
    """Judgements of a file. A passage judged twice for a query keeps the later grade, as trec_eval does.

    Args:
        refused: takes lines that are no judgement; None: the first of them is an error.

    Raises:
        EvaluationError: a file that cannot be read, or without any judgement.
    """
    qrels: Qrels = {}
    is_json = path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    for item in _json_judgements(path, refused) if is_json else _judgement_columns(path, refused):
        if isinstance(item, Refused):
            refuse(item, refused)
        else:
            query_id, passage_id, grade = item
            qrels.setdefault(query_id, {})[passage_id] = grade
    if not qrels:
        raise nothing_left(path, "judgements", refused)
    return qrels


def _judgement_columns(path: Path, refused: list[Refused] | None) -> Iterator[Judgement | Refused]:
    """BEIR's or TREC's columns."""
    for position, (place, line) in enumerate(numbered_lines(path, refused)):
        columns = fields(line)
        if position == 0 and _is_header(columns):
            continue
        if len(columns) not in (3, 4):
            expected = "query, passage, grade (BEIR) or query, iteration, passage, grade (TREC)"
            yield Refused(place, None, Reason.BROKEN_ROW, f"{len(columns)} columns; expected {expected}")
        else:
            yield _judgement(place, columns[0], columns[-2], columns[-1])


def _json_judgements(path: Path, refused: list[Refused] | None) -> Iterator[Judgement | Refused]:
    """Objects with the columns' names as keys."""
    for place, row in json_rows(path, refused):
        keys = [next((key for key in names if key in row), None) for names in (QUERY_KEYS, PASSAGE_KEYS, GRADE_NAMES)]
        if None in keys:
            message = f"fields {', '.join(row)}; expected {QUERY_KEYS[0]}, {PASSAGE_KEYS[0]} and an integer score"
            yield Refused(place, None, Reason.MISSING_FIELD, message)
        else:
            yield _judgement(place, *(row[key] for key in keys if key is not None))


def _judgement(place: Place, query: object, passage: object, grade: object) -> Judgement | Refused:
    query_id, passage_id = id_text(query), id_text(passage)
    for name, value, id_ in (("query", query, query_id), ("passage", passage, passage_id)):
        if id_ is None:
            message = f"the {name} id is {value!r}; expected a string or integer"
            return Refused(place, None, Reason.WRONG_TYPE, message)
        try:
            passage_id_bytes(id_)
        except InvalidName as exc:
            return Refused(place, None, Reason.BAD_ID, str(exc))
    assert query_id is not None
    assert passage_id is not None
    try:
        if isinstance(grade, float | bool):
            raise TypeError
        return query_id, passage_id, int(grade)  # type: ignore[call-overload]  # whatever is no integer raises
    except (TypeError, ValueError):
        return Refused(place, passage_id, Reason.WRONG_TYPE, f"the grade is {grade!r}; expected an integer")


def read_run(path: Path) -> RunFile:
    """A TREC run file, each query's passages by falling score; equal scores by rank, then line.

    Raises:
        EvaluationError: a line of another form, a passage twice for one query, or an empty file.
    """
    rows: dict[str, dict[str, tuple[float, int]]] = {}
    tag = ""
    for place, line in numbered_lines(path):
        columns = fields(line)
        if len(columns) != 6:
            raise EvaluationError(f"{place}: {len(columns)} columns; expected query, Q0, passage, rank, score, tag")
        query_id, _, passage_id, rank, score, tag = columns
        found = rows.setdefault(query_id, {})
        if passage_id in found:
            raise EvaluationError(f"{place}: passage {passage_id!r} a second time for query {query_id!r}")
        found[passage_id] = (_number(place, "score", score), int(_number(place, "rank", rank)))
    if not rows:
        raise EvaluationError(f"{path}: no ranked passages")
    run = {
        query_id: [(p, score) for p, (score, _) in sorted(found.items(), key=lambda row: (-row[1][0], row[1][1]))]
        for query_id, found in rows.items()
    }
    return RunFile(run, tag)


def write_run(path: str | Path, run: Run, tag: str) -> None:
    """A TREC run file, whole or not at all, in the lines of `run_lines`.

    Raises:
        EvaluationError: an id that the format cannot carry.
    """
    with open_output(path) as file:
        for query_id, ranking in run.items():
            file.writelines(run_lines(query_id, ranking, tag))


def run_lines(query_id: str, ranking: Sequence[tuple[str, float]], tag: str) -> list[str]:
    """The lines of one query. Scores fall strictly, also as float32, so that every tool keeps this order.

    Scores that do so are written so that they read back as the same numbers.

    Raises:
        EvaluationError: an id that the format cannot carry.
    """
    check_ids(query_id, *(passage_id for passage_id, _ in ranking))
    scores = falling(score for _, score in ranking)
    return [
        f"{query_id} Q0 {passage_id} {rank} {score!r} {tag}\n"
        for rank, ((passage_id, _), score) in enumerate(zip(ranking, scores, strict=True), 1)
    ]


def write_qrels(path: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """TREC judgements.

    Raises:
        EvaluationError: an id with blanks in it, which the format cannot carry.
    """
    with open_output(path) as file:
        for query_id, grades in qrels.items():
            check_ids(query_id, *grades)
            for passage_id, grade in grades.items():
                file.write(f"{query_id} 0 {passage_id} {grade}\n")


def _is_header(columns: list[str]) -> bool:
    """`query-id corpus-id score` and its kin. Not any word: a grade misspelt in line 1 should be told."""
    return len(columns) in (3, 4) and columns[-1].casefold() in GRADE_NAMES


def _number(place: Place, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise EvaluationError(f"{place}: {name} is {text!r}; expected a number") from exc
    if not math.isfinite(value):
        raise EvaluationError(f"{place}: {name} is {text!r}; expected a finite number")
    return value


def check_ids(*ids: str) -> None:
    """
    Raises:
        EvaluationError: an id that no TREC file can carry.
    """
    for id_ in ids:
        if not id_ or id_.split() != [id_]:
            raise EvaluationError(f"id {id_!r} is empty or has blanks; a TREC file cannot carry it")
