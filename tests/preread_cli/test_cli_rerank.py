"""`preread rerank` against a running server: one query, files of queries, every kind of candidates."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from zlib import crc32

import grpc
import ir_measures
import pytest
from click.testing import CliRunner

from preread import Client, Passage
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread_cli.main import cli
from preread_local import Reranker
from tuning.trec import read_run

PASSAGES = {
    f"p{i}": f"Passage number {i} speaks of {word}." for i, word in enumerate(["sky", "sea", "grass", "night", "sun"])
}
COLLECTION = "cli-rerank"


@pytest.fixture
def rerank(command):
    return partial(command, "rerank")


def ids(answer) -> list[str]:
    return [result["passage_id"] for result in json.loads(answer.stdout)["results"]]


def test_a_whole_collection_is_ranked_as_the_client_ranks_it(rerank, client) -> None:
    answer = rerank("blue sky", "-c", COLLECTION, "--json")

    assert answer.exit_code == 0
    assert ids(answer) == [r.passage_id for r in client.rerank("blue sky", sorted(PASSAGES), collection=COLLECTION)]
    assert json.loads(answer.stdout)["summary"]["num_scored"] == 5


def test_a_whole_collection_needs_no_store_here(rerank, client, tmp_path: Path, monkeypatch) -> None:
    """Its ids are the server's: an empty directory stays empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREREAD_STORE", f"faiss:{tmp_path / 'other'}")
    assert rerank("blue sky", "-c", COLLECTION).exit_code == 0
    for name, said in (("no-such", "'no-such' does not exist"), (f"{COLLECTION}-empty", "is empty")):
        if said == "is empty":
            list(client.upsert([Passage("gone", "a text")], collection=name))
            client.delete(["gone"], collection=name)
        answer = rerank("blue sky", "-c", name)
        assert answer.exit_code == 2
        assert said in answer.stderr
        assert "the server at 127.0.0.1:" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_collection_over_the_bound_is_left_to_a_first_stage(rerank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preread_cli.commands.rerank.MAX_WHOLE_COLLECTION", 4)
    answer = rerank("blue sky", "-c", COLLECTION)
    assert answer.exit_code == 2
    assert f"'{COLLECTION}' has 5 passages; without --ids or --run at most 4 are ranked" in answer.stderr
    monkeypatch.setattr(Client, "list_collections", lambda self: ())  # one that cannot be described is not listed
    assert "has more than 4 passages" in rerank("blue sky", "-c", COLLECTION).stderr


def test_a_table_shows_rank_score_and_text(rerank) -> None:
    answer = rerank("blue sky", "-c", COLLECTION, "--top-n", "2")

    assert answer.exit_code == 0
    assert "5 of 5 scored by tiny-reranker" in answer.stdout
    assert sum(line.startswith(("1", "2", "3")) for line in answer.stdout.splitlines()) == 2
    assert "speaks of" in answer.stdout


def test_a_ratio_and_stages_are_read_as_asked_and_shown(rerank) -> None:
    plain = json.loads(rerank("blue sky", "-c", COLLECTION, "--compression-ratio", "8", "--json").stdout)
    assert {result["compression_ratio"] for result in plain["results"]} == {8}
    assert plain["summary"]["compression_ratio"] == 8

    staged = json.loads(rerank("blue sky", "-c", COLLECTION, "--stages", "32:2, 8", "--json").stdout)
    assert [len(result["stages"]) for result in staged["results"]] == [2, 2, 1, 1, 1]

    table = rerank("blue sky", "-c", COLLECTION, "--stages", "32:2, 8").stdout
    assert "ratio" in table.splitlines()[1]
    assert "scored in stages 32:2,8" in " ".join(table.split())

    both = rerank("blue sky", "-c", COLLECTION, "--stages", "32:2, 8", "--compression-ratio", "8")
    assert both.exit_code == 2
    assert "stages" in both.stderr
    assert rerank("blue sky", "-c", COLLECTION, "--stages", "8:2, 32").exit_code == 2


def test_stages_that_the_collection_cannot_give_are_said_and_why(rerank, tmp_path: Path) -> None:
    """It is stored at 4."""
    said = "stages 32:2,4 in place of 32:2,4:1,1; no multiple of the stored ratio: 1"
    table = rerank("blue sky", "-c", COLLECTION, "--stages", "32:2, 4:1, 1")
    assert table.exit_code == 0, table.stderr
    assert said in " ".join(table.stdout.split())
    assert "in place of" not in rerank("blue sky", "-c", COLLECTION, "--stages", "32:2, 8").stdout

    (tmp_path / "queries.tsv").write_text("q1\tblue sky\nq2\tgreen grass\n")
    queries = ("--queries", str(tmp_path / "queries.tsv"), "-c", COLLECTION, "--output", str(tmp_path / "out.run"))
    assert rerank(*queries, "--stages", "32:2, 4:1, 1").stderr.count(said) == 1

    summary = json.loads(rerank("blue sky", "-c", COLLECTION, "--stages", "32:2, 4:1, 1", "--json").stdout)["summary"]
    assert [(one["compression_ratio"], one["keep"]) for one in summary["stages"]] == [(32, 2), (4, 0)]


def test_a_run_of_a_cascade_reads_back_in_its_order(rerank, client, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("q1\tblue sky\n")
    run = tmp_path / "out.run"
    answer = rerank(
        "--queries", str(tmp_path / "queries.tsv"), "-c", COLLECTION, "--stages", "32:2,8", "--output", str(run)
    )
    assert answer.exit_code == 0, answer.stderr
    expected = client.rerank("blue sky", sorted(PASSAGES), collection=COLLECTION, stages="32:2,8")
    assert [passage_id for passage_id, _ in read_run(run).run["q1"]] == [r.passage_id for r in expected]


def test_ids_from_a_file_or_standard_input(rerank, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("p3\n\np1\n")

    assert sorted(ids(rerank("q", "-c", COLLECTION, "--ids", str(tmp_path / "ids"), "--json"))) == ["p1", "p3"]
    assert sorted(ids(rerank("q", "-c", COLLECTION, "--ids", "-", "--json", stdin="p3\np1\n"))) == ["p1", "p3"]


def test_texts_need_no_collection(rerank, tmp_path: Path) -> None:
    plain = tmp_path / "texts.gz"
    plain.write_bytes(gzip.compress(b"The first text.\nThe second text.\n"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": 7, "title": "T", "text": "one"}\n{"text": "two"}\n')

    first = json.loads(rerank("q", "--candidates", str(plain), "--json").stdout)["results"]
    second = json.loads(rerank("q", "--candidates", str(rows), "--json").stdout)["results"]

    assert {r["text"] for r in first} == {"The first text.", "The second text."}
    assert {(r["passage_id"], r["text"]) for r in second} == {("7", "T one"), ("", "two")}


def test_more_candidates_than_a_request_takes_are_merged(rerank, client, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("blue sky", "-c", COLLECTION, "--ids", "-", "--on-miss", "skip", "--top-n", "4", "--json")
    stdin = "\n".join([*PASSAGES, "missing"])
    whole = json.loads(rerank(*arguments, stdin=stdin).stdout)
    few = [replace(info, max_candidates=2) for info in client.list_models()]
    monkeypatch.setattr(Client, "list_models", lambda self: few)
    parts = json.loads(rerank(*arguments, stdin=stdin).stdout)

    for name in ("index", "passage_id", "status"):
        assert [r[name] for r in parts["results"]] == [r[name] for r in whole["results"]]
    margins = [r["margin"] for r in whole["results"]]
    assert [r["margin"] for r in parts["results"]][:4] == pytest.approx(margins[:4], abs=1e-5)
    assert parts["summary"]["num_scored"] == whole["summary"]["num_scored"] == 5


def test_what_is_not_scored_is_shown_and_ends_with_1(rerank) -> None:
    answer = rerank("q", "-c", COLLECTION, "--ids", "-", stdin="p1\nnowhere\n")

    assert answer.exit_code == 1
    assert "not scored: nowhere  missing" in answer.stdout


def test_a_file_of_queries_gives_a_trec_run(rerank, client, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("q1\tblue sky\nq2\tgreen grass\nq3\tnot in the run\n")
    (tmp_path / "first.run").write_text(
        "".join(f"{q} Q0 p{i} {i + 1} {9 - i} bm25\n" for q in ("q1", "q2") for i in range(4))
    )
    out = tmp_path / "out.run"

    answer = rerank(
        *("--queries", str(tmp_path / "queries.tsv"), "--run", str(tmp_path / "first.run"), "--depth", "3"),
        *("-c", COLLECTION, "--output", str(out)),
    )

    assert answer.exit_code == 0
    assert "2 queries, 6 passages scored, 0 not scored" in answer.stderr
    written = read_run(out)
    assert written.tag == "preread"
    assert list(written.run) == ["q1", "q2"]
    expected = client.rerank("blue sky", ["p0", "p1", "p2"], collection=COLLECTION)
    assert written.run["q1"] == [(r.passage_id, pytest.approx(r.margin, abs=1e-5)) for r in expected]


def test_queries_as_json_in_and_json_out(rerank, tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text('{"_id": 1, "text": "blue sky"}\n{"_id": 2, "text": "green grass"}\n')
    out = tmp_path / "out.jsonl"

    answer = rerank("--queries", str(tmp_path / "queries.jsonl"), "-c", COLLECTION, "--json", "--output", str(out))

    assert answer.exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["query_id"], row["query"], len(row["results"])) for row in rows] == [
        ("1", "blue sky", 5),
        ("2", "green grass", 5),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a QUERY"),
        (["q"], "Name the --collection"),
        (["q", "-c", COLLECTION, "--ids", "a", "--candidates", "b"], "exclude one another"),
        (["q", "-c", COLLECTION, "--run", "a"], "--run goes with --queries"),
        (["q", "-c", "no-such"], "says: collection: 'no-such' does not exist"),
        (["q", "-c", "no-such", "--ids", "-"], "no-such"),
        (["q", "-c", COLLECTION, "--ids", "/no/such/file"], "/no/such/file: No such file"),
        (["q", "-c", COLLECTION, "--model-name", "other", "--ids", "-"], "model is 'other'"),
        (["q", "-c", COLLECTION, "--compression-ratio", "3", "--ids", "-"], "compression_ratio"),
    ],
)
def test_bad_input_is_one_line_and_2(rerank, arguments: list[str], message: str) -> None:
    answer = rerank(*arguments, stdin="p1\n")

    assert answer.exit_code == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken\n", ":1: begins with { and is not JSON"),
        ('{"text": "fine"}\n{"title": "only"}\n', ":2: neither id nor text"),
        ('{"text": ["list"]}\n', ":1: text is ['list']; expected a string"),
        ("", "nothing to rank"),
    ],
)
def test_a_bad_line_is_named(rerank, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(content)
    answer = rerank("q", "--candidates", str(tmp_path / "c.jsonl"))

    assert answer.exit_code == 2
    assert message in answer.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1 no tab\n", ":1: no tab"),
        ("q1\ta\nq1\tb\n", ":2: query id 'q1' a second time"),
        ('{"_id": "1"}\n', ":1: fields _id; expected id and text"),
        ("", "no queries"),
    ],
)
def test_a_bad_query_is_named(rerank, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q").write_text(content)
    answer = rerank("--queries", str(tmp_path / "q"), "-c", COLLECTION)

    assert answer.exit_code == 2
    assert message in answer.stderr


def test_one_of_several_servers_is_enough(server_pair, client) -> None:
    arguments = ["rerank", "blue", "-c", COLLECTION, "--json"]
    answer = CliRunner().invoke(cli, [*arguments, "--address", f"127.0.0.1:1,{server_pair.address}"])
    assert answer.exit_code == 0, answer.output
    assert re.fullmatch("[0-9a-f]{32}", json.loads(answer.stdout)["request_id"])

    answer = CliRunner().invoke(cli, [*arguments, "--address", f"{server_pair.address},here"])
    assert answer.exit_code == 2
    assert "address[1] is 'here'; expected host:port" in answer.stderr


def test_no_server_is_3_and_says_what_to_start() -> None:
    answer = CliRunner().invoke(cli, ["rerank", "q", "--candidates", "-", "--address", "127.0.0.1:1"], input="a\n")

    assert answer.exit_code == 3
    assert "is `preread serve` running there? --local needs no server" in answer.stderr


def test_local_needs_no_server(tiny_checkpoint, tmp_path: Path) -> None:
    """The same table, of a model in this process; over a store where one is named."""
    texts, store = tmp_path / "texts.txt", f"faiss:{tmp_path}/data"
    texts.write_text("".join(f"{text}\n" for text in PASSAGES.values()))
    local = ["rerank", "blue sky", "--local", "--model", str(tiny_checkpoint), "--store", store]
    answer = CliRunner().invoke(cli, [*local, "--candidates", str(texts), "--json"])
    assert answer.exit_code == 0, answer.output
    assert {result["status"] for result in json.loads(answer.stdout)["results"]} == {"encoded"}
    assert not (tmp_path / "data").exists()

    with Reranker(tiny_checkpoint, store=store) as reranker:
        reranker.index(PASSAGES, collection=COLLECTION)
        expected = [one.passage_id for one in reranker.rerank("blue sky", [*PASSAGES], collection=COLLECTION)]
    answer = CliRunner().invoke(cli, [*local, "-c", COLLECTION, "--json"])
    assert (answer.exit_code, ids(answer)) == (0, expected), answer.output


@pytest.mark.parametrize("named", [["--store", "memory:"], ["--model", "nowhere"]])
def test_a_server_has_its_own_model_and_store(named) -> None:
    answer = CliRunner().invoke(cli, ["rerank", "q", "--candidates", "-", *named], input="a\n")
    assert answer.exit_code == 2
    assert f"{named[0]} goes with --local" in answer.stderr


class Loading(rerank_pb2_grpc.RerankServiceServicer):
    """A server before its models have loaded, which serves none yet."""

    def ListModels(self, request, context):  # noqa: N802
        return rerank_pb2.ListModelsResponse()


def test_a_server_that_is_still_loading_is_3_and_said() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    rerank_pb2_grpc.add_RerankServiceServicer_to_server(Loading(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    answer = CliRunner().invoke(cli, ["rerank", "q", "-c", "x", "--address", address])
    server.stop(0).wait()
    assert answer.exit_code == 3
    assert f"the server at {address} is still loading its models" in answer.stderr


class Counting(rerank_pb2_grpc.RerankServiceServicer):
    """Scores by the bytes of query and passage; remembers how many queries each call had, up to `room` of them."""

    def __init__(self, *, reads_text: bool, room: int) -> None:
        self.calls: list[int] = []
        self.room = room
        encoder = None if reads_text else common_pb2.EncoderIdentity(dim=64)
        self.model = rerank_pb2.ModelInfo(name="counting", encoder=encoder, max_candidates=4)

    def ListModels(self, request, context):  # noqa: N802
        return rerank_pb2.ListModelsResponse(models=[self.model])

    def Rerank(self, request, context):  # noqa: N802
        self.calls.append(1)
        return self.ranked(request.query, request)

    def RerankMany(self, request, context):  # noqa: N802
        self.calls.append(len(request.queries))
        if len(request.queries) > self.room:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        for i, query in enumerate(request.queries):
            yield rerank_pb2.RerankManyResponse(index=i, response=self.ranked(query, request.request))

    def ranked(self, query: str, request: rerank_pb2.RerankRequest) -> rerank_pb2.RerankResponse:
        margins = [crc32(f"{query} {one.passage_id}".encode()) / 2**31 for one in request.candidates]
        best = sorted(range(len(margins)), key=lambda i: -margins[i])
        given = [(i, margins[i], request.candidates[i].passage_id) for i in best]
        results = [rerank_pb2.Result(index=i, margin=m, score=m / 4, passage_id=name, status=1) for i, m, name in given]
        return rerank_pb2.RerankResponse(results=results, model="counting", num_scored=len(results))


@pytest.mark.parametrize(
    ("num_queries", "reads_text", "room", "calls"),
    [
        (70, False, 64, [32, 32, 32, 32, 6, 6]),  # six candidates go in two requests
        (10, False, 64, [10, 10]),
        (5, False, 2, [5, 2, 3, 1, 2] * 2),  # halves, where the server has no room for all
        (3, True, 64, [1] * 6),
    ],
)
def test_queries_over_the_same_candidates_share_calls_and_the_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_queries: int, reads_text: bool, room: int, calls: list[int]
) -> None:
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\tquery number {i}\n" for i in range(num_queries)))
    (tmp_path / "ids").write_text("\n".join(f"p{i}" for i in range(6)))
    service, server = Counting(reads_text=reads_text, room=room), grpc.server(ThreadPoolExecutor(4))
    rerank_pb2_grpc.add_RerankServiceServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    command = ["rerank", "--queries", str(tmp_path / "queries.tsv"), "-c", "docs", "--ids", str(tmp_path / "ids")]
    command += ["--address", address, "--top-n", "5"]
    together = CliRunner().invoke(cli, command)
    assert together.exit_code == 0, together.output
    assert service.calls == calls if not reads_text else sorted(service.calls) == calls
    service.calls.clear()
    monkeypatch.setattr("preread_cli.commands.rerank.QUERIES_PER_CALL", 1)
    alone = CliRunner().invoke(cli, command)
    server.stop(0).wait()
    assert service.calls == [1] * (2 * num_queries)
    assert (together.stdout, together.stderr) == (alone.stdout, alone.stderr)
    assert len(together.stdout.splitlines()) == 5 * num_queries


def test_equal_scores_are_written_in_our_order_for_every_evaluator(rerank, client, tmp_path: Path) -> None:
    """trec_eval breaks ties by falling passage id: `z` would come before what we rank first."""
    candidates = [{"id": name, "text": "The same text."} for name in ("a", "m", "z")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in candidates))
    (tmp_path / "queries.tsv").write_text("q1\tblue sky\n")
    out = tmp_path / "out.run"
    arguments = ("--queries", str(tmp_path / "queries.tsv"), "--candidates", str(tmp_path / "texts.jsonl"))

    assert rerank(*arguments, "--output", str(out)).exit_code == 0

    (one, *others) = client.rerank("blue sky", candidates)
    # Equal up to rounding: a row's place in a batch may move its last bit on some processors.
    assert [other.margin for other in others] == pytest.approx([one.margin] * 2, abs=1e-6)
    run = sorted(ir_measures.read_trec_run(str(out)), key=lambda row: (row.score, row.doc_id), reverse=True)
    assert [row.doc_id for row in run] == [line.split()[2] for line in out.read_text().splitlines()]


def test_standard_output_is_appended_to_and_a_closed_pipe_ends_quietly(server_pair, client, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\tblue sky\n" for i in range(300)))
    (tmp_path / "ids").write_text("\n".join(PASSAGES))
    command = [sys.executable, "-m", "preread", "rerank", "-c", COLLECTION, "--address", server_pair.address]
    command += ["--queries", str(tmp_path / "queries.tsv"), "--ids", str(tmp_path / "ids")]
    log = tmp_path / "log.run"
    log.write_text("before\n")
    with log.open("a") as file:
        subprocess.run(command, stdout=file, check=True, capture_output=False, stderr=subprocess.DEVNULL)
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert len(lines) == 1 + 300 * 5

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("q0 Q0 p")
        process.stdout.close()
        told = process.stderr.read()
    assert "Traceback" not in told
    assert "rror" not in told
    assert process.returncode == 1


def test_a_failed_run_leaves_the_old_file(rerank, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("q1\tblue sky\nq2\t\n")  # the server refuses an empty query
    out = tmp_path / "out.run"
    out.write_text("old\n")
    answer = rerank("--queries", str(tmp_path / "queries.tsv"), "-c", COLLECTION, "--output", str(out))
    assert answer.exit_code == 2
    assert out.read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.run", "queries.tsv"]


def test_what_no_run_can_carry_is_said_before_anything_is_scored(rerank, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("q 1\tblue sky\n")
    answer = rerank("--queries", str(tmp_path / "queries.tsv"), "-c", COLLECTION)
    assert answer.exit_code == 2
    assert "id 'q 1' is empty or has blanks" in answer.stderr
    assert "scored" not in answer.stderr


def test_standard_input_is_read_once(rerank) -> None:
    answer = rerank("--queries", "-", "-c", COLLECTION, "--ids", "-", stdin="q1\tblue sky\n")
    assert answer.exit_code == 2
    assert "can be read once" in answer.stderr
