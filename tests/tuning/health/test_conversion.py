"""A converted model gives the language model's scores; nothing half-done or wrong is ever left behind."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import Size, make_cross_encoder
from checkpoint import CheckpointError
from decoder_server.models.cross_encoder.conversion import CausalSource, staged
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from preread_cli.main import cli
from tuning.health import PairSet
from tuning.health.parity import parity

SOME = PairSet("some", PairSet.read().pairs[::9])


def converted(source: Path, target: Path) -> Path:
    with staged(target) as folder:
        CausalSource.open(str(source)).convert(folder)
    return target


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "MistralForCausalLM"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_column_0_becomes_the_score(
    tmp_path: Path, architecture: str, tied: bool, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {"max_shard_size": "30KB"} if sharded else {}
    source = make_cross_encoder(
        tmp_path / "source", architecture, Size(), config={"tie_word_embeddings": tied}, **shards
    )
    if sharded:
        monkeypatch.setattr("decoder_server.models.cross_encoder.conversion.SHARD_BYTES", 40_000)
    target = converted(source, tmp_path / "target")

    opened = CausalSource.open(str(source))
    assert opened.tied is tied
    assert (target / "model.safetensors.index.json").exists() is sharded
    for row in parity(opened, target, SOME):
        assert row.passed, row
        assert row.rank_agreement == 1
        assert row.max_delta == 0 or row.dtype == "float32"

    config = json.loads((target / "config.json").read_text())
    assert (config["num_labels"], config["id2label"]) == (1, {"0": "SCORE"})
    assert config["pad_token_id"] == opened.pad_token_id
    assert json.loads((target / "tokenizer_config.json").read_text())["padding_side"] == "left"


def test_what_is_served_is_the_original(causal: Path, tmp_path: Path) -> None:
    """Both through the product: template, readout, float32 head."""
    texts = list(SOME.pairs)
    original = open_cross_encoder(
        causal, device="cpu", dtype="float32", profile="ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b"
    )
    classifier = open_cross_encoder(converted(causal, tmp_path / "target"), device="cpu", dtype="float32")

    assert classifier.profile.template == original.profile.template
    assert "CC-BY-NC-SA-4.0" in classifier.notice
    np.testing.assert_allclose(classifier.score_texts(texts), original.score_texts(texts), atol=1e-6)


def test_tensors_keep_their_bytes_and_the_head_is_gone(causal: Path, tmp_path: Path) -> None:
    before = load_file(causal / "model.safetensors")
    after = load_file(converted(causal, tmp_path / "target") / "model.safetensors")

    assert torch.equal(after.pop("score.weight"), before.pop("lm_head.weight")[:1])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_stay_small_whatever_the_source(causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One large file in, small files out: the peak is a shard, not the model."""
    monkeypatch.setattr("decoder_server.models.cross_encoder.conversion.SHARD_BYTES", 20_000)
    target = converted(causal, tmp_path / "target")
    files = sorted(target.glob("*.safetensors"))

    assert len(files) > 3
    for file in files:
        with safe_open(str(file), framework="pt") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
            assert sum(sizes) <= 20_000 or len(sizes) <= 2  # a tensor over the limit goes alone, or with the score


def test_a_pad_token_is_found_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    source = make_cross_encoder(tmp_path / "source", "Qwen3ForCausalLM", Size(), config={"pad_token_id": None})
    edit(source / "tokenizer_config.json", pad_token=None)
    target = converted(source, tmp_path / "target")

    assert CausalSource.open(str(source)).pad_token == "<|im_end|>"  # the end of a sequence: prompts end in ` ??`
    rows = parity(CausalSource.open(str(source)), target, SOME, ["float32"])  # batches: a pad token is needed
    assert rows[0].passed


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_head(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")


def zero_row(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0] = 0
    save_file(tensors, source / "model.safetensors")


def reads_yes_and_no(source: Path) -> None:
    (source / "preread-profile.toml").write_text(
        '[[profile]]\nmodels = ["m"]\narchitectures = ["Qwen3ForCausalLM"]\nhead = "vocabulary"\nyes = 1\nno = 2\n'
        'padding = "left"\ntemplate = ["{query} {passage}"]\n'
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: edit(s / "config.json", architectures=["LlamaForCausalLM"]), "the architecture LlamaForCausalLM"),
        (lambda s: edit(s / "config.json", architectures=["Qwen3ForSequenceClassification"]), "already"),
        (lambda s: edit(s / "config.json", quantization_config={"quant_method": "fp8"}), "quantized (fp8)"),
        (lambda s: edit(s / "config.json", vocab_size=12), "the embedding has 12 rows"),
        (lambda s: edit(s / "config.json", vocab_size=5000), "config.json says (5000, 32)"),
        (lambda s: (s / "config.json").unlink(), "config.json: missing"),
        (lambda s: (s / "tokenizer.json").unlink(), "no tokenizer; expected one of tokenizer.json"),
        (lambda s: (s / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda s: (s / "model.safetensors").write_bytes(b"no"), "cannot be read as safetensors"),
        (without_head, "config.json does not tie it"),
        (zero_row, "zero or not finite"),
        (reads_yes_and_no, "reads more than column 0"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_converted_is_one_error(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    source = make_cross_encoder(tmp_path / "source", "Qwen3ForCausalLM", Size())
    spoil(source)
    with pytest.raises(CheckpointError) as caught:
        converted(source, tmp_path / "target")
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def fail() -> None:
        with staged(target) as folder:
            (folder / "half").write_text("done")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []

    (tmp_path / ".target.converting").mkdir()
    (tmp_path / ".target.converting" / "half").write_text("of a process that was killed")
    with staged(target) as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole").write_text("done")
    assert [path.name for path in target.iterdir()] == ["whole"]

    with pytest.raises(CheckpointError, match="exists and is not empty"), staged(target):
        pass


def test_two_conversions_into_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / ".target.converting"
    folder.mkdir()
    (folder / "half").write_text("being written")
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="another process"), staged(tmp_path / "target"):
            pass
        assert (folder / "half").exists()
    finally:
        os.close(other)


def test_the_command_converts_and_says_what_it_proved(causal: Path, tmp_path: Path, some_file: Path) -> None:
    answer = CliRunner().invoke(cli, ["convert-ctxl", str(causal), str(tmp_path / "t"), "--pairs", str(some_file)])

    assert answer.exit_code == 0, answer.output
    for words in ("row 0 of lm_head.weight", "max |delta|", "Kendall tau", "rank agreement", "float32", "bfloat16"):
        assert words in answer.output
    record = json.loads((tmp_path / "t" / "conversion.json").read_text())
    assert [row["dtype"] for row in record["parity"]] == ["float32", "bfloat16"]
    assert all(row["passed"] for row in record["parity"])


def test_the_command_refuses_what_does_not_agree(
    causal: Path, tmp_path: Path, some_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuning.health.parity.COLUMN", 1)  # the wrong row
    target = tmp_path / "t"
    answer = CliRunner().invoke(cli, ["convert-ctxl", str(causal), str(target), "--pairs", str(some_file)])

    assert answer.exit_code == 1
    assert "FAIL" in answer.output
    assert "was not made" in answer.output
    assert os.listdir(tmp_path) == [some_file.name]


@pytest.fixture
def some_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": p.query, "instruction": p.instruction, "passage": p.passage} for p in SOME.pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
