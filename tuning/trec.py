"""Judgements, runs and rankings in the forms that the field's tools read and write.

Judgements: BEIR's three columns (query, passage, grade) with or without a header line, TREC's four
(query, iteration, passage, grade), or a JSON object a line. Runs: TREC's six (query, Q0, passage, rank, score, tag).
Not ir_measures' readers: they know no BEIR columns and no tabs, drop ranks and the tag, name no line, and come with
an extra that `preread rerank` does without.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.errors import InvalidName
from cache.record import passage_id_bytes
from encoder_worker.sources import Place, Reason, Refused, SourceError, source_id
from encoder_worker.sources.files import DEFAULT_MAX_LINE_BYTES, STDIN, json_object, open_bytes, read_texts
from preread_edge.outputs import open_output
from tuning import EvaluationError

Qrels = dict[str, dict[str, int]]  # query_id -> {passage_id: grade}
Run = dict[str, list[tuple[str, float]]]  # query_id -> [(passage_id, score)], best first
T = TypeVar("T")
_Judgement = tuple[str, str, int]  # query_id, passage_id, grade

_GRADE_NAMES = ("score", "grade", "relevance", "rel", "label")  # of the last column, in a header line
# Keys of a JSON line; the first that is there counts.
_JSON_KEYS = (("query-id", "query_id", "qid"), ("corpus-id", "passage_id", "doc_id", "docid", "pid"), _GRADE_NAMES)

# trec_eval compares scores as float32 and breaks ties by passage id. Neighbours are kept at least this far
# apart, relative to their size: two units in the last place of a float32.
_STEP = 2.0**-22
_LARGEST = 1e38  # below float32's largest number, with room for the steps


class JudgedFile:
    """Lines of a text file: plain, gzip or zstd; `-` is standard input.

    A line that cannot be used is appended to `refused` with its place; where that is None, it raises EvaluationError.
    """

    def __init__(self, path: str | Path, refused: list[Refused] | None = None) -> None:
        self.path = path
        self._refused = refused

    def lines(self) -> Iterator[tuple[Place, str]]:
        """Lines that are not blank, without their ends. Raises EvaluationError for a file that cannot be read."""
        try:
            with open_bytes(str(self.path), sys.stdin.buffer) as (stream, _):
                source = "standard input" if str(self.path) == STDIN else str(self.path)
                yield from self.usable(read_texts(stream, source, DEFAULT_MAX_LINE_BYTES))
        except SourceError as exc:
            raise EvaluationError(str(exc)) from exc

    def rows(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """The JSON object of each line. Raises as `lines`."""
        for place, line in self.lines():
            for row in self.usable([json_object(place, line)]):
                yield place, row

    def usable(self, items: Iterable[T | Refused]) -> Iterator[T]:
        for item in items:
            if not isinstance(item, Refused):
                yield item
            elif self._refused is None:
                raise EvaluationError(str(item))
            else:
                self._refused.append(item)

    def require(self, found: object, kind: str) -> None:
        """Raises EvaluationError where `found` is empty; the first refused line says why."""
        if not found:
            why = [str(item) for item in self._refused or () if item.place.source == str(self.path)]
            reason = f"; {len(why):,} lines refused, the first is {why[0]}" if why else ""
            raise EvaluationError(f"{self.path}: no {kind}{reason}")


def read_qrels(path: Path, refused: list[Refused] | None = None) -> Qrels:
    """Judgements of a file, at least one. A passage judged twice for a query keeps the later grade, as in trec_eval."""
    file, qrels = JudgedFile(path, refused), Qrels()
    is_json = path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    for query_id, passage_id, grade in file.usable(_json_judgements(file) if is_json else _columns(file)):
        qrels.setdefault(query_id, {})[passage_id] = grade
    file.require(qrels, "judgements")
    return qrels


def _columns(file: JudgedFile) -> Iterator[_Judgement | Refused]:
    for position, (place, line) in enumerate(file.lines()):
        columns = _split(line)
        if len(columns) not in (3, 4):
            expected = "query, passage, grade (BEIR) or query, iteration, passage, grade (TREC)"
            yield Refused(place, None, Reason.BROKEN_ROW, f"{len(columns)} columns; expected {expected}")
        # A header ends with a known name: a misspelt grade in line 1 is no header.
        elif position or columns[-1].casefold() not in _GRADE_NAMES:
            yield _judgement(place, columns[0], columns[-2], columns[-1])


def _json_judgements(file: JudgedFile) -> Iterator[_Judgement | Refused]:
    for place, row in file.rows():
        keys = [key for names in _JSON_KEYS if (key := next((name for name in names if name in row), None))]
        if len(keys) == 3:
            yield _judgement(place, *(row[key] for key in keys))
        else:
            message = f"fields {', '.join(row)}; expected query-id, corpus-id and an integer score"
            yield Refused(place, None, Reason.MISSING_FIELD, message)


def _judgement(place: Place, query: object, passage: object, grade: object) -> _Judgement | Refused:
    ids = []
    for name, value in (("query", query), ("passage", passage)):
        id_ = source_id(value)
        if id_ is None:
            return Refused(
                place, None, Reason.WRONG_TYPE, f"the {name} id is {value!r}; expected a string or whole number"
            )
        try:
            passage_id_bytes(id_)
        except InvalidName as exc:
            return Refused(place, None, Reason.BAD_ID, str(exc))
        ids.append(id_)
    try:
        if isinstance(grade, float | bool):
            raise TypeError
        return ids[0], ids[1], int(grade)  # type: ignore[call-overload]  # anything but an integer raises
    except (TypeError, ValueError):
        return Refused(place, ids[1], Reason.WRONG_TYPE, f"the grade is {grade!r}; expected an integer")


class RunFile(NamedTuple):
    """A run, and the tag of the system that made it."""

    run: Run
    tag: str


def read_run(path: Path) -> RunFile:
    """A TREC run by falling score, then rank, then line. Raises EvaluationError: a bad line, a passage twice."""
    rows: dict[str, dict[str, tuple[float, int]]] = {}
    file, tag = JudgedFile(path), ""
    for place, line in file.lines():
        columns = _split(line)
        if len(columns) != 6:
            raise EvaluationError(f"{place}: {len(columns)} columns; expected query, Q0, passage, rank, score, tag")
        query_id, _, passage_id, position, score, tag = columns
        found = rows.setdefault(query_id, {})
        if passage_id in found:
            raise EvaluationError(f"{place}: passage {passage_id!r} a second time for query {query_id!r}")
        found[passage_id] = (-_number(place, "score", score), int(_number(place, "rank", position)))
    file.require(rows, "ranked passages")
    by_rank = {q: sorted(found.items(), key=lambda row: row[1]) for q, found in rows.items()}
    return RunFile({q: [(p, -negated) for p, (negated, _) in found] for q, found in by_rank.items()}, tag)


def run_lines(query_id: str, ranking: Sequence[tuple[str, float]], tag: str) -> list[str]:
    """A run file's lines of one query; scores are lowered until they fall strictly, as in `rank`. As `check_ids`."""
    check_ids(query_id, *(passage_id for passage_id, _ in ranking))
    scores = _falling(score for _, score in ranking)
    return [
        f"{query_id} Q0 {passage_id} {position} {score!r} {tag}\n"
        for position, ((passage_id, _), score) in enumerate(zip(ranking, scores, strict=True), 1)
    ]


def write_runs(folder: str | Path, qrels: Qrels, runs: Mapping[str, Run]) -> list[Path]:
    """TREC files, each whole or not at all: judgements as qrels.txt, and a run by name. Raises as `check_ids`."""
    paths = [Path(folder) / "qrels.txt", *(Path(folder) / f"{name}.run" for name in runs)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with open_output(paths[0]) as file:
        for query_id, grades in qrels.items():
            check_ids(query_id, *grades)
            file.writelines(f"{query_id} 0 {passage_id} {grade}\n" for passage_id, grade in grades.items())
    for path, (name, run) in zip(paths[1:], runs.items(), strict=True):
        with open_output(path) as file:
            for query_id, ranking in run.items():
                file.writelines(run_lines(query_id, ranking, f"preread-{name}"))
    return paths


def check_ids(*ids: str) -> None:
    """Raises EvaluationError for an id that no TREC file can carry."""
    for id_ in ids:
        if not id_ or id_.split() != [id_]:
            raise EvaluationError(f"id {id_!r} is empty or has blanks; a TREC file cannot carry it")


def order(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Rows by falling score; equal ones stay in place, rows without a score (NaN) come last."""
    values = np.asarray(scores, dtype=np.float64)
    missing = np.isnan(values)
    return np.lexsort((np.where(missing, 0.0, -values), missing))  # stable, last key first


def rank(candidates: Sequence[str], scores: NDArray[np.floating] | Sequence[float]) -> list[tuple[str, float]]:
    """Candidates by falling score; equal scores stay in candidate order, candidates without a score come last.

    The scores returned fall strictly, even in float32, so that no tool reorders them: (nearly) equal ones are lowered.
    `scores`: (num_candidates,), NaN where there is none.
    """
    values = np.asarray(scores, dtype=np.float64)
    rows = order(values)
    lowered = _falling(np.nan_to_num(values[rows], posinf=np.inf, neginf=-np.inf))
    return [(candidates[row], score) for row, score in zip(rows.tolist(), lowered, strict=True)]


def _falling(scores: Iterable[float]) -> list[float]:
    """Scores of a ranking, best first, lowered until they fall strictly as float32; beyond its range, ranks instead."""
    lowered: list[float] = []
    ceiling = np.inf
    for score in scores:
        lowered.append(min(ceiling, float(score)))
        ceiling = lowered[-1] - _STEP * max(1.0, abs(lowered[-1]))
    if lowered and not (lowered[-1] > -_LARGEST and lowered[0] < _LARGEST):
        return [float(-position) for position in range(1, len(lowered) + 1)]
    return lowered


def _split(line: str) -> list[str]:
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def _number(place: Place, name: str, text: str) -> float:
    try:
        value, expected = float(text), "a finite number"
    except ValueError:
        value, expected = math.nan, "a number"
    if not math.isfinite(value):
        raise EvaluationError(f"{place}: {name} is {text!r}; expected {expected}")
    return value
