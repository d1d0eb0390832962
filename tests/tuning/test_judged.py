"""Judged files are read as they are; what is wrong with one is said in one sentence that names the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from encoder_worker.sources import Refused, SeenIds, SourcePassage
from encoder_worker.sources.files import Source
from tuning import EvaluationError
from tuning.judged import read_judged
from tuning.trec import read_qrels


def test_a_beir_folder_is_read_whole(beir: Path) -> None:
    judged = read_judged(beir)
    assert judged.name == "beir"
    assert judged.passages["rust"] == "rust is iron oxide"
    assert judged.passages["moon"] == "The Moon orbits the Earth and causes tides"
    assert list(judged.queries) == ["q1", "q2", "q3", "q4"]  # q5 is not judged, "lost" has no text
    assert judged.qrels["q1"] == {"tide": 2, "moon": 1, "nowhere": 1}
    assert judged.unknown_queries == ("lost",)
    assert judged.num_judgements_of_unknown_queries == 1


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/test.tsv"])
def test_every_layout_reads_alike(make_beir: Callable[..., Path], zipped: bool, header: bool, qrels: str) -> None:
    judged = read_judged(make_beir(zipped=zipped, qrels=qrels, header=header))
    assert len(judged.passages) == 7
    assert {q: len(grades) for q, grades in judged.qrels.items()} == {"q1": 3, "q2": 2, "q3": 2, "q4": 1}


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\n1\ta\t1\n2\tb\t0\n",
        "1\ta\t1\n2\tb\t0\n",
        "1 0 a 1\n2 0 b 0\n",
        "1\t0\ta\t1\r\n\r\n2\t0\tb\t0\r\n",
        "\ufeff1 a 1\n2 b 0",
    ],
)
def test_judgements_in_every_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "qrels").write_bytes(text.encode())
    assert read_qrels(tmp_path / "qrels") == {"1": {"a": 1}, "2": {"b": 0}}


def test_a_split_is_the_field_of_the_queries_or_a_file_of_judgements(beir: Path) -> None:
    assert list(read_judged(beir, split="test").queries) == ["q2", "q3", "q4"]
    (beir / "qrels").mkdir()
    (beir / "qrels/dev.tsv").write_text("q5\tmoon\t1\n")
    assert list(read_judged(beir, split="dev").queries) == ["q5"]


def test_a_named_file_wins_over_the_folders(beir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("q5 0 moon 1\n")
    assert list(read_judged(beir, qrels=tmp_path / "mine.txt").queries) == ["q5"]
    judged = read_judged(corpus=beir / "corpus.jsonl", queries=beir / "queries.jsonl", qrels=tmp_path / "mine.txt")
    assert judged.name == "queries"
    assert list(judged.queries) == ["q5"]


def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order(beir: Path) -> None:
    judged = read_judged(beir)
    drawn = [tuple(judged.sample(2, seed).queries) for seed in range(20)]
    assert drawn == [tuple(judged.sample(2, seed).queries) for seed in range(20)]
    assert len(set(drawn)) > 3
    assert all(list(pair) == sorted(pair) for pair in drawn)
    assert list(judged.sample(2, 0).qrels) == list(judged.sample(2, 0).queries)
    assert judged.sample(4, 0) is judged


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


ODD_PASSAGES = [
    ('{"_id": \n', "not JSON"),
    ("[1]\n", "a JSON list; expected an object"),
    ('{"text": "x"}\n', "no id or _id; found text"),
    ('{"_id": "o"}\n', "no text; found _id"),
    ('{"_id": 1.5, "text": "x"}\n', "id is the number 1.5; expected a string or whole number"),
    ('{"_id": "moon", "text": "other"}\n', "id 'moon' came before, at "),
    ('{"_id": "o", "text": "\\ud800"}\n', "text is not valid Unicode"),
    ('{"_id": "\\ud800", "text": "o"}\n', "cannot be written as UTF-8"),
    ('{"_id": "o", "text": " "}\n', "text is empty"),
    ('{"_id": "o", "text": null}\n', "text is null; expected a string"),
    (b'{"_id": "o", "text": "\xff"}\n', "not UTF-8"),
]
ODD_QUERIES = [
    (line if isinstance(line, bytes) else line.replace("moon", "q1"), says.replace("moon", "q1"))
    for line, says in ODD_PASSAGES
]
ODD_JUDGEMENTS = [
    ("q1\tmoon\n", "2 columns; expected query, passage, grade"),
    ("q1\tnew\thigh\n", "the grade is 'high'; expected an integer"),
    ("q1\tnew\t1.5\n", "the grade is '1.5'; expected an integer"),
    ("\tnew\t1\n", "empty"),
    (b"q1\t\xff\t1\n", "not UTF-8"),
]
ODD_JSON_JUDGEMENTS = [
    ('{"query-id": "q1", "corpus-id": 1.5, "score": 1}\n', "the passage id is 1.5; expected a string or whole number"),
    ('{"query-id": "\\ud800", "corpus-id": "new", "score": 1}\n', "cannot be written as UTF-8"),
    ('{"query-id": "q1", "corpus-id": "new", "score": true}\n', "the grade is True; expected an integer"),
    ('{"query-id": "q1", "score": 1}\n', "fields query-id, score; expected query-id, corpus-id"),
]


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [(name, *odd)
     for name, odds in (("corpus.jsonl", ODD_PASSAGES), ("queries.jsonl", ODD_QUERIES), ("qrels.tsv", ODD_JUDGEMENTS))
     for odd in odds],
)  # fmt: skip
def test_an_odd_line_costs_itself_and_is_named(beir: Path, name: str, line: str | bytes, says: str) -> None:
    whole = read_judged(beir)
    with (beir / name).open("ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
    number = len((beir / name).read_bytes().splitlines())

    judged = read_judged(beir)

    (refused,) = judged.refused
    assert str(refused).startswith(f"{beir / name}:{number}: ")
    assert says in str(refused)
    assert (judged.passages, judged.queries, judged.qrels) == (whole.passages, whole.queries, whole.qrels)


@pytest.mark.parametrize(("line", "says"), ODD_JSON_JUDGEMENTS)
def test_an_odd_json_judgement_too(beir: Path, line: str, says: str) -> None:
    good = '{"query-id": "q1", "corpus-id": "moon", "score": 1}\n'
    (beir / "odd.jsonl").write_text(line + good)
    judged = read_judged(beir, qrels=beir / "odd.jsonl")
    assert judged.qrels == {"q1": {"moon": 1}}
    assert says in str(judged.refused[0])
    assert judged.refused[0].place.line == 1


@pytest.mark.parametrize("odd", [line for line, _ in ODD_PASSAGES])
def test_a_corpus_is_read_as_it_is_indexed(beir: Path, odd: str | bytes) -> None:
    """Evaluation reads the passages that indexing stores."""
    with (beir / "corpus.jsonl").open("ab") as file:
        file.write(odd if isinstance(odd, bytes) else odd.encode())
    seen = SeenIds()
    items = [seen.once(item) if isinstance(item, SourcePassage) else item for item in Source([beir])]
    judged = read_judged(beir)
    assert judged.passages == {item.passage_id: item.text for item in items if isinstance(item, SourcePassage)}
    assert [str(item) for item in judged.refused] == [str(item) for item in items if isinstance(item, Refused)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("corpus.jsonl"), "beir: has none of corpus.jsonl, corpus.jsonl.gz, corpus.jsonl.zst; name the "),
        (_remove("qrels.tsv"), "has none of qrels.tsv, qrels/test.tsv, qrels.txt, qrels.jsonl; name the qrels file"),
        (_write("corpus.jsonl", '{"text": "x"}\n'), "corpus.jsonl: no passages; 1 lines refused, the first is "),
        (_write("corpus.jsonl", ""), "corpus.jsonl: no passages"),
        (_write("queries.jsonl", "[1]\n[2]\n"), "queries.jsonl: no queries; 2 lines refused, the first is "),
        (_write("queries.jsonl", ""), "queries.jsonl: no queries"),
        (_write("qrels.tsv", "q1\tmoon\thigh\n"), "the grade is 'high'; expected an integer"),
        (_write("qrels.tsv", "query-id\tcorpus-id\tscore\n"), "qrels.tsv: no judgements"),
        (_write("qrels.tsv", "other\tmoon\t1\n"), "qrels.tsv: judges no query of "),
    ],
)
def test_files_without_use_give_one_error_that_names_the_place(
    beir: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(beir)
    with pytest.raises(EvaluationError) as caught:
        read_judged(beir)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["corpus", "queries"])
def test_a_broken_gzip_stream_is_named(make_beir: Callable[..., Path], name: str) -> None:
    path = make_beir(zipped=True) / f"{name}.jsonl.gz"
    for content in (path.read_bytes()[:-20], b"plain"):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match=rf"{name}\.jsonl\.gz:"):
            read_judged(path.parent)


def test_an_unknown_split_names_those_there_are(beir: Path) -> None:
    with pytest.raises(EvaluationError, match="no judged query of split 'dev'; it has: test, train"):
        read_judged(beir, split="dev")
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "x"}) + "\n")
    with pytest.raises(EvaluationError, match="no judged query of split 'dev'; it has: its rows have no field"):
        read_judged(beir, split="dev")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nowhere: no such folder"):
        read_judged(tmp_path / "nowhere")
