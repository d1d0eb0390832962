"""Judgements and run files, in the forms the field's tools read and write. Does not know texts or scores' meaning.

Judgements: BEIR's three columns (query, passage, grade) with or without a header line, TREC's four
(query, iteration, passage, grade), or a JSON object a line. Runs: TREC's six (query, Q0, passage, rank, score, tag).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import InvalidName
from cache.names import passage_id_bytes
from encoder_worker.sources import Place, Reason, Refused
from preread.outputs import open_output
from preread.passages import id_text
from tuning.errors import EvaluationError
from tuning.files import fields, json_rows, nothing_left, numbered_lines, refuse
from tuning.ranking import falling

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
