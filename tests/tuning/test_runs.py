"""Run files: what is written reads back the same, here and in ir_measures; ties go by candidate order."""

from __future__ import annotations

from pathlib import Path

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from tuning import EvaluationError
from tuning.baselines import search
from tuning.trec import Run, rank, read_qrels, read_run, write_runs


def write_run(folder: Path, run: Run, name: str = "x") -> Path:
    return write_runs(folder, {}, {name: run})[1]


SCORES = st.one_of(st.floats(-1e4, 1e4, width=32), st.just(float("nan")), st.sampled_from([0.0, 1.0, 1.0 + 1e-9]))


@given(st.lists(SCORES, max_size=30))
def test_a_ranking_sorts_stably_and_falls_strictly(scores: list[float]) -> None:
    names = [f"p{i}" for i in range(len(scores))]
    ranking = rank(names, np.array(scores))
    missing = [np.isnan(score) for score in scores]
    naive = sorted(range(len(scores)), key=lambda i: (missing[i], 0.0 if missing[i] else -scores[i]))
    assert [name for name, _ in ranking] == [names[i] for i in naive]
    values = np.array([score for _, score in ranking], dtype=np.float32)  # what trec_eval compares
    assert (np.diff(values) < 0).all()


def test_scores_that_differ_are_kept_as_they_are() -> None:
    assert rank(["a", "b", "c"], [1.5, -2.25, 7.0]) == [("c", 7.0), ("a", 1.5), ("b", -2.25)]


def test_candidates_without_a_score_come_last_in_their_order() -> None:
    assert [p for p, _ in rank(["a", "b", "c", "d"], [np.nan, -5.0, np.nan, -9.0])] == ["b", "d", "a", "c"]
    assert [p for p, _ in rank(["b", "a"], [np.nan, np.nan])] == ["b", "a"]


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run = {"q1": rank(["b", "a", "c"], [0.1, 0.1, 1 / 3]), "q2": [], "q3": rank(["x"], [-1e-7])}
    back = read_run(write_run(tmp_path, run, "mine"))
    assert back.tag == "preread-mine"
    assert back.run == {q: ranking for q, ranking in run.items() if ranking}
    theirs = [(s.query_id, s.doc_id, s.score) for s in ir_measures.read_trec_run(str(tmp_path / "mine.run"))]
    assert theirs == [(q, p, score) for q, ranking in run.items() for p, score in ranking]


MARGINS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.floats(-1e-6, 1e-6),
    st.sampled_from([0.0, -0.0, 1.0, 1e30, -1e30, 3.4028234663852886e38, -3.4028234663852886e38, 1e300, -1e300]),
)


@given(st.lists(MARGINS, min_size=1, max_size=40))
def test_every_evaluator_keeps_the_order_that_is_written(tmp_path_factory: pytest.TempPathFactory, margins) -> None:
    """Names sort against the order, as trec_eval breaks ties by them; it compares float32."""
    ranking = [(f"p{i:03}", margin) for i, margin in enumerate(sorted(margins, reverse=True))]
    path = write_run(tmp_path_factory.mktemp("run"), {"q": ranking})
    scores = [float(line.split()[4]) for line in path.read_text().splitlines()]
    assert (np.diff(np.array(scores, dtype=np.float32)) < 0).all()
    assert [p for p, _ in read_run(path).run["q"]] == [p for p, _ in ranking]
    last = ranking[-1][0]
    found = pytrec_eval.RelevanceEvaluator({"q": {last: 1}}, {"recip_rank"}).evaluate(
        {"q": {line.split()[2]: float(line.split()[4]) for line in path.read_text().splitlines()}}
    )
    assert found["q"]["recip_rank"] == pytest.approx(1 / len(ranking))


def test_writing_a_written_run_again_changes_nothing(tmp_path: Path) -> None:
    first = write_run(tmp_path / "1", {"q": [("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", -5.0)]})
    again = write_run(tmp_path / "2", read_run(first).run)
    assert first.read_bytes() == again.read_bytes()


def test_a_foreign_run_is_ordered_by_score_then_rank(tmp_path: Path) -> None:
    (tmp_path / "x.run").write_text("q Q0 low 3 1.0 t\nq Q0 tie2 2 5 t\nq Q0 tie1 1 5 t\n")
    assert [p for p, _ in read_run(tmp_path / "x.run").run["q"]] == ["tie1", "tie2", "low"]


def test_judgements_read_back_as_they_were_written(tmp_path: Path) -> None:
    qrels = {"q1": {"a": 2, "b": 0}, "q2": {"a": 1}}
    write_runs(tmp_path, qrels, {})
    assert read_qrels(tmp_path / "qrels.txt") == qrels
    theirs = {(r.query_id, r.doc_id): r.relevance for r in ir_measures.read_trec_qrels(str(tmp_path / "qrels.txt"))}
    assert theirs == {("q1", "a"): 2, ("q1", "b"): 0, ("q2", "a"): 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 p 1 2.0\n", "x.run:1: 5 columns; expected query, Q0, passage, rank, score, tag"),
        ("q Q0 p 1 2.0 t\nq Q0 r 2 high t\n", "x.run:2: score is 'high'; expected a number"),
        ("q Q0 p 1 nan t\n", "x.run:1: score is 'nan'; expected a finite number"),
        ("q Q0 p first 1 t\n", "x.run:1: rank is 'first'; expected a number"),
        ("q Q0 p 1 2 t\nq Q0 p 2 1 t\n", "x.run:2: passage 'p' a second time for query 'q'"),
        ("\n", "x.run: no ranked passages"),
    ],
)
def test_bad_run_files_give_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.run").write_text(text)
    with pytest.raises(EvaluationError) as caught:
        read_run(tmp_path / "x.run")
    assert message in str(caught.value)


def test_an_id_that_the_format_cannot_carry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="id 'two words' is empty or has blanks"):
        write_run(tmp_path, {"q": [("two words", 1.0)]})


def test_bm25_orders_by_shared_words() -> None:
    passages = {
        "none": "bread and butter",
        "one": "tides of time",
        "two": "tides of the moon",
        "three": "moon tides moon",
    }
    run = search(passages, {"q": "moon tides", "empty": "", "unheard": "zzz"}, top_k=10)
    assert [p for p, _ in run["q"]] == ["three", "two", "one"]
    assert run["empty"] == []
    assert run["unheard"] == []


def test_bm25_breaks_ties_by_corpus_order_also_at_the_border() -> None:
    passages = {f"p{i}": "salt water" for i in (3, 1, 2, 0)} | {"best": "salt salt"}
    run = search(passages, {"q": "salt"}, top_k=3)
    assert [p for p, _ in run["q"]] == ["best", "p3", "p1"]


def test_bm25_of_a_corpus_without_words_finds_nothing() -> None:
    assert search({"a": "", "b": "?!"}, {"q": "salt"}, top_k=3) == {"q": []}
