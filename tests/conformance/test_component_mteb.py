"""preread.integrations.mteb in MTEB: BM25, then Preread, on files in BEIR's format; a table from one command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import mteb
import pytest

from preread import Client, Passage
from preread.integrations.mteb import FolderTask, PrereadCrossEncoder, main, rerank_first_stage

ROOT = Path(__file__).parents[2]
NUM_QUERIES, TOP_K = 6, 5
FIRST_STAGE = "mteb/baseline-bm25s"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The first claims of examples/scifact, all abstracts that are judged for them, and a hundred others."""
    source, made = ROOT / "examples" / "scifact", tmp_path_factory.mktemp("beir") / "claims"
    made.mkdir()
    header, *judgements = (source / "qrels.tsv").read_text().splitlines()
    claims = list(dict.fromkeys(line.split("\t")[0] for line in judgements))[:NUM_QUERIES]
    judged = [line for line in judgements if line.split("\t")[0] in claims]
    (made / "qrels.tsv").write_text("\n".join([header, *judged]) + "\n")
    relevant = {line.split("\t")[1] for line in judged}
    (made / "queries.jsonl").write_bytes(gzip.decompress((source / "queries.jsonl.gz").read_bytes()))
    lines = gzip.decompress((source / "corpus.jsonl.gz").read_bytes()).decode().splitlines()
    kept = [line for i, line in enumerate(lines) if i < 100 or json.loads(line)["_id"] in relevant]
    (made / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(kept).encode()))
    return made


@pytest.fixture(scope="module")
def first_stage(folder, tmp_path_factory) -> Path:
    """BM25's predictions, as mteb saves them."""
    predictions = tmp_path_factory.mktemp("bm25")
    rerank_first_stage([FolderTask.of(folder)], FIRST_STAGE, TOP_K, predictions)
    return predictions


def read(folder: Path, task: str) -> dict[str, dict[str, float]]:
    return json.loads((folder / f"{task}_predictions.json").read_text())["default"]["test"]


def evaluate(model, folder, first_stage, tmp_path) -> dict[str, dict[str, float]]:
    task = FolderTask.of(folder)
    rerank_first_stage([task], str(first_stage), TOP_K, tmp_path)
    mteb.evaluate(model, [task], prediction_folder=tmp_path, cache=None, show_progress_bar=False)
    return read(tmp_path, "claims")


def test_scores_are_the_margins_of_the_first_stages_best(narrow, folder, first_stage, tmp_path):
    found = evaluate(PrereadCrossEncoder(narrow.grpc_address), folder, first_stage, tmp_path)

    assert len(found) == NUM_QUERIES
    bm25 = read(first_stage, "claims")
    texts = {row["id"]: f"{row['title']} {row['text']}".strip() for row in FolderTask.of(folder)._read("corpus")}
    queries = {row["id"]: row["text"] for row in FolderTask.of(folder)._read("queries")}
    with Client(narrow.grpc_address) as client:
        for query_id, scores in found.items():
            assert set(scores) == set(sorted(bm25[query_id], key=bm25[query_id].get, reverse=True)[:TOP_K])
            for passage_id, score in scores.items():
                assert client.rerank(queries[query_id], [texts[passage_id]])[0].margin == pytest.approx(score, abs=1e-4)


def test_passages_are_found_by_id(narrow, folder, first_stage, tmp_path):
    rows = FolderTask.of(folder)._read("corpus")
    with Client(narrow.grpc_address, encoder_address=narrow.encoder_address) as client:
        passages = [Passage(row["id"], f"{row['title']} {row['text']}".strip()) for row in rows]
        list(client.upsert(passages, collection="beir-claims"))

    settings = {"collection": "beir-{task}", "send_text": False}
    found = evaluate(PrereadCrossEncoder(narrow.grpc_address, **settings), folder, first_stage, tmp_path)

    assert sum(map(len, found.values())) == NUM_QUERIES * TOP_K


def test_instructions_of_a_task_are_sent(narrow, folder, first_stage, tmp_path):
    one = evaluate(PrereadCrossEncoder(narrow.grpc_address, instruction="Refute."), folder, first_stage, tmp_path / "1")
    plain = evaluate(PrereadCrossEncoder(narrow.grpc_address), folder, first_stage, tmp_path / "plain")
    metadata = FolderTask.of(folder).metadata.model_copy(update={"prompt": {"query": "Find what refutes the claim."}})
    task = FolderTask.of(folder)
    type(task).metadata = metadata
    rerank_first_stage([task], str(first_stage), TOP_K, tmp_path)
    model = PrereadCrossEncoder(narrow.grpc_address, task_instructions=True)
    mteb.evaluate(model, [task], prediction_folder=tmp_path, cache=None, show_progress_bar=False)

    assert read(tmp_path, "claims") != plain != one


def test_a_command_fills_a_table(narrow, model, folder, tmp_path, capsys):
    arguments = [str(folder), "--first-stage", FIRST_STAGE, "--top-k", str(TOP_K), "--address", narrow.grpc_address]

    main([*arguments, "--output", str(tmp_path)])

    line, mean = capsys.readouterr().out.splitlines()
    task, measure, score = line.split("\t")
    assert (task, measure, mean) == ("claims", "ndcg_at_10", f"mean of 1\t\t{score}")
    assert 0 <= float(score) <= 1
    (saved,) = tmp_path.rglob("claims.json")
    assert f"preread__{model}" in str(saved)
    main([*arguments, "--output", str(tmp_path), "--instruction", "Other."])  # other settings are other results
    assert len(list(tmp_path.rglob("claims.json"))) == 2


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["no-such-task"], "no-such-task"),
        ([str(ROOT / "docs")], "has no judgements; expected qrels.tsv or qrels/test.tsv"),
        (["SciFact", "MIRACLReranking"], "SciFact: retrieval without candidates; expected --first-stage"),
    ],
)
def test_a_command_that_cannot_run_says_why(names, said, capsys):
    with pytest.raises(SystemExit):
        main(names)
    assert said in capsys.readouterr().err


def test_benchmarks_and_tasks_are_known_by_name():
    from preread.integrations.mteb import find_tasks

    assert {"SciFact", "NFCorpus", "CQADupstackRetrieval"} <= {one.metadata.name for one in find_tasks("BEIR")}
    assert len(find_tasks("LMEB")) > 5
    assert [one.metadata.type for one in find_tasks("MIRACLReranking")] == ["Reranking"]
