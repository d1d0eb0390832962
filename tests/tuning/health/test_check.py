"""`preread check` as a user meets it: the shipped checkpoint, cross-encoders, published scores, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from checkpoint.synthetic import make_checkpoint
from decoder_server.config import ModelConfig
from decoder_server.models.fbnl.kv_cache import KVCache
from preread_cli.main import cli
from preread_cli.models import SHIPPED_MODEL
from tuning import EvaluationError
from tuning.health import PairSet, Verdict, check
from tuning.health.checks import published

OTHER = "other weights or template"


def float32(model: object) -> ModelConfig:
    return ModelConfig(str(model), dtype="float32")


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["check", *map(str, words)])


def test_the_built_in_pairs_are_what_they_are_said_to_be() -> None:
    pairs = PairSet.read().pairs
    korean = [any("가" <= c <= "힣" for c in pair.query + pair.passage) for pair in pairs]

    assert len(pairs) == len(set(pairs)) == 100
    assert len({pair.query for pair in pairs}) == 20
    assert sum(pair.instruction is not None for pair in pairs) == 45
    assert sum(korean) > 40
    assert sum(not one for one in korean) > 40
    lengths = [len(pair.passage) for pair in pairs]
    assert max(lengths) > 8 * min(lengths)


def test_the_shipped_checkpoint_is_healthy(tmp_path: Path) -> None:
    answer = run(SHIPPED_MODEL, "--json-file", tmp_path / "deep" / "health.json")
    assert answer.exit_code == 0, answer.output
    report = json.loads((tmp_path / "deep" / "health.json").read_text())

    assert report["passed"]
    assert [section["title"] for section in report["sections"]] == [
        "the model alone",
        *([] if "float32" in report["served"] else ["bfloat16 against float32"]),
        *(["bfloat16 against float32"] if "float32" in report["served"] else []),
        "stored states (SQfp16) against on demand",
        "cached against recomputed",
        "cached as int8 against recomputed",
        "stored at r = 1, re-pooled to 4",
        "r = 4 against r = 1",
        "published scores",
    ]


def test_caches_that_change_margins_are_found(some_pairs: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries whose layers come back in another order."""
    read = KVCache.read
    monkeypatch.setattr(KVCache, "read", lambda self, entry: read(self, entry).flip(0))
    report = check(float32(SHIPPED_MODEL), pairs=some_pairs)
    kept = {s.title for s in report.sections if s.title.startswith("cached")}
    assert {s.title for s in report.sections if s.failed} == kept
    assert report.causes[0].startswith("cached keys and values are not the recomputed ones")


def test_a_codec_that_ruins_states_is_found(some_pairs: PairSet) -> None:
    report = check(float32(SHIPPED_MODEL), pairs=some_pairs, codec="PQ1x1")
    assert not report.passed
    assert any(s.failed and s.title.startswith("stored states (PQ1x1)") for s in report.sections)
    assert report.causes[0].startswith("the codec PQ1x1 loses too much")


def test_another_model_is_not_this_one(bert: Path, roberta: Path, some_pairs: PairSet) -> None:
    assert check(float32(bert), against=str(bert), pairs=some_pairs).passed
    report = check(float32(bert), against=str(roberta), pairs=some_pairs)
    assert not report.passed
    assert report.against == str(roberta)
    assert report.causes == [f"its scores are right for its own weights and are not those of {roberta}: {OTHER}"]


def test_bfloat16_and_korean_in_the_table(roberta: Path) -> None:
    answer = run(roberta, "--dtype", "bfloat16")
    assert "bfloat16 against plain float32" in answer.output


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BAAI/bge-reranker-base", 1),
        ("/models/BAAI/bge-reranker-base", 1),
        ("/cache/models--BAAI--bge-reranker-base/snapshots/0a1b2c", 1),
        ("KaLM-Embedding/KaLM-Reranker-V1-Nano", 2),
        ("ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b", 1),
        ("BAAI/bge-reranker-base-mine", 0),  # a name that contains another is another model
        ("preread/models/preread-mini", 0),
    ],
)
def test_published_scores_go_by_exact_id(name: str, expected: int) -> None:
    assert len(published(name)) == expected


def test_weights_that_are_not_the_published_ones_are_found(roberta: Path, tmp_path: Path, some_pairs: PairSet) -> None:
    directory = tmp_path / "BAAI" / "bge-reranker-base"
    shutil.copytree(roberta, directory)
    report = check(float32(directory), pairs=some_pairs)

    assert report.line("published scores", "four passages").state is Verdict.FAIL
    assert "published 0.8789, 0.9961, 0.9961, 0.05029" in report.line("published scores", "four passages").detail
    assert report.causes[0].startswith("these are not the published weights")


def test_kalm_weights_that_are_not_kalms_are_found(tmp_path: Path, some_pairs: PairSet) -> None:
    directory = make_checkpoint(tmp_path / "KaLM-Embedding" / "KaLM-Reranker-V1-Nano")
    report = check(float32(directory), pairs=some_pairs)
    assert report.line("published scores", "its card").state is Verdict.FAIL


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q"', "pairs.jsonl:2: not JSON"),
        ('["q", "p"]', "pairs.jsonl:2: a JSON list; expected an object"),
        ('{"query": "q"}', "pairs.jsonl:2: fields query; expected query and passage"),
        ('{"query": "", "passage": "p"}', "pairs.jsonl:2: query is ''; expected a text"),
        ('{"query": "q", "passage": 7}', "pairs.jsonl:2: passage is 7; expected a text"),
        ('{"query": "q", "passage": "p", "instruction": ["i"]}', "pairs.jsonl:2: instruction is ['i']"),
    ],
)
def test_a_malformed_pairs_file_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "text": "p"}\n' + line + "\n")
    answer = run(SHIPPED_MODEL, "--pairs", path)

    assert answer.exit_code == 2
    assert message in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_one_pair_has_no_order(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "document": "p"}\n')
    with pytest.raises(EvaluationError, match="1 pairs; expected at least 2"):
        PairSet.read(path)


def test_few_pairs_are_noted(bert: Path) -> None:
    report = check(float32(bert), pairs=PairSet("few", PairSet.read().pairs[:5]))
    assert any(note.startswith("only 5 pairs") for note in report.notes)


def test_bad_input_is_one_clear_error(bert: Path, tmp_path: Path) -> None:
    no_tokenizer = shutil.copytree(bert, tmp_path / "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    other_kind = shutil.copytree(bert, tmp_path / "other")
    config = json.loads((other_kind / "config.json").read_text())
    (other_kind / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    for words, message in (
        (["no/such/model"], "no such directory"),
        ([no_tokenizer], "tokenizer"),
        ([other_kind], "cannot be served from its configuration alone"),
        ([bert, "--against", "no/such/model"], "no such directory"),
        ([bert, "--profile", "nonsense"], "profile is 'nonsense'"),
        ([bert, "--runtime", "tensorrt"], "runtime is 'tensorrt'"),
        ([bert, "--codec", "SQ8"], "codec is for fbnl checkpoints"),
        ([SHIPPED_MODEL, "--profile", "generic"], "profile is for cross-encoders"),
        ([SHIPPED_MODEL, "--codec", "nonsense"], "'nonsense' is unknown"),
    ):
        answer = run(*words)
        assert answer.exit_code == 2, (words, answer.output)
        assert message in answer.stderr, (words, answer.stderr)
        lines = answer.stderr.strip().splitlines()
        assert len(lines) == 1 or lines[0].startswith("Usage: "), answer.stderr  # click's form for a flag's value
