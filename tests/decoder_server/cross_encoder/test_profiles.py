"""The table: exact ids, one recipe each, errors that name the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoint.files import CheckpointError
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.profiles import (
    FILE_NAME,
    Profile,
    builtin_profiles,
)

# The reference list of models this table must know.
KNOWN = {
    "sigridjineth/ctxl-rerank-v2-1b-seq-cls",
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b",
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-2b",
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b",
    "BAAI/bge-reranker-v2-m3",
    "BAAI/bge-reranker-large",
    "BAAI/bge-reranker-base",
    "cross-encoder/mmarco-mMiniLMv2-L12-H384-v1",
    "cross-encoder/ms-marco-MiniLM-L6-v2",
    "amberoad/bert-multilingual-passage-reranking-msmarco",
    "maidalun1020/bce-reranker-base_v1",
    "jinaai/jina-reranker-v1-turbo-en",
    "jinaai/jina-reranker-v2-base-multilingual",
    "ibm-granite/granite-embedding-reranker-english-r2",
    "mixedbread-ai/mxbai-rerank-xsmall-v1",
    "mixedbread-ai/mxbai-rerank-base-v1",
    "mixedbread-ai/mxbai-rerank-large-v1",
    "Qwen/Qwen3-Reranker-0.6B",
    "Qwen/Qwen3-Reranker-4B",
    "Qwen/Qwen3-Reranker-8B",
    "BAAI/bge-reranker-v2-gemma",
    "zeroentropy/zerank-1-small",
    "jinaai/jina-reranker-v3",
    "zenlm/zen3-reranker",
    "zenlm/zen3-reranker-medium",
    "zenlm/zen3-reranker-small",
    "mixedbread-ai/mxbai-rerank-base-v2",
    "mixedbread-ai/mxbai-rerank-large-v2",
}

LIST = (
    '[[profile]]\nmodels = ["me/list"]\narchitectures = ["JinaForRanking"]\nhead = "listwise"\n'
    'passage_token = "<p>"\nquery_token = "<q>"\ntemplate = ["{query}{passages}"]\n'
)
ROW = '[[profile]]\nmodels = ["me/mine"]\narchitectures = ["BertForSequenceClassification"]\n'


def test_every_known_model_has_a_profile() -> None:
    assert set(builtin_profiles()) >= KNOWN


def test_ids_match_exactly_and_only_so() -> None:
    assert Profile.named("BAAI/bge-reranker-base", None) is not None
    for name in ("BAAI/bge-reranker-base-v9", "me/bge-reranker-base", "bge-reranker-base", "baai/bge-reranker-base"):
        assert Profile.named(name, None) is None


def test_a_directory_laid_out_like_the_hub_is_known_by_its_id() -> None:
    for name in (
        "/models/BAAI/bge-reranker-base",
        "/cache/models--BAAI--bge-reranker-base/snapshots/0123abc",
        "BAAI/bge-reranker-base/",
    ):
        profile = Profile.named(name, None)
        assert profile is not None
        assert profile.model == "BAAI/bge-reranker-base"


def test_ctxl_is_announced_as_not_for_commercial_use(
    tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny("Qwen3ForSequenceClassification")
    model = open_cross_encoder(directory, profile="sigridjineth/ctxl-rerank-v2-1b-seq-cls", dtype="float32")
    assert "CC-BY-NC-SA-4.0; not for commercial use" in model.notice
    assert model.notice in caplog.messages
    free = open_cross_encoder(tiny("BertForSequenceClassification"), profile="generic")
    assert free.notice == ""


def test_a_users_file_adds_a_profile(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ROW + 'activation = "sigmoid"\ntemperature = 2\ntemplate = ["{query} | {passage}"]\n')
    model = open_cross_encoder(tiny("BertForSequenceClassification"), profile=str(path), dtype="float32")
    assert model.profile.model == "me/mine"
    margins = model.score_texts([("q", None, "p")])
    np.testing.assert_allclose(model.activation(margins), 1 / (1 + np.exp(-margins / 2)), rtol=1e-6)
    assert (
        model.read([("q", None, "p")])[0].ids
        == model._reader.tokenizers.exact.encode("q | p", add_special_tokens=False).ids
    )


def test_a_checkpoint_may_carry_its_own_profile(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    for file in tiny("BertForSequenceClassification").iterdir():
        (directory / file.name).symlink_to(file)
    (directory / FILE_NAME).write_text(ROW + "max_tokens = 77\n")
    assert open_cross_encoder(directory).profile.max_tokens == 77
    assert open_cross_encoder(directory, profile="generic").profile.max_tokens == 512


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("models = [", "not TOML"),
        ('[model]\nname = "x"', "expected [[profile]] tables and nothing else"),
        (ROW.replace("models", "names"), "unknown key 'names'"),
        (ROW.replace("architectures", "#"), "architectures is missing"),
        (ROW.replace("models", "#"), "models is missing"),
        (ROW.replace('["me/mine"]', "[]"), "models is []; expected `array` of length >= 1"),
        (ROW + 'patting = "left"', "unknown key 'patting'"),
        (ROW + 'padding = "middle"', "padding is 'middle'; expected one of left, right"),
        (ROW + 'max_tokens = "many"', "max_tokens is 'many'; expected `int`"),
        (ROW + "max_tokens = 0", "max_tokens is 0; expected `int` >= 1"),
        (ROW + "strip = 1", "strip is 1; expected `bool`"),
        (ROW + "template = ['{query}']", "template has the fields ['query']"),
        (ROW + "template = ['{query} {passage} {']", "braces of the text itself are doubled"),
        (ROW + "instruction_format = '{instruction}'", "instruction_format needs a template"),
        (ROW + "template = ['{query} {passage.x}']", "template has the fields ['passage.x', 'query']"),
        (ROW + "template = ['{query} {passage:>9}']", "template has the fields ['passage>9', 'query']"),
        (
            ROW + "template = ['{query} {passage}{instruction}']\ninstruction_format = ' {task}'",
            "instruction_format has the fields ['task']; expected ['instruction']",
        ),
        (ROW + "template = ['{query} {passage!r}']", "template has the fields ['passager', 'query']"),
        (ROW + "template = ['{query} {passage}{:>9}']", "template has the fields ['>9', 'passage', 'query']"),
        (ROW + "template = ['{query}', '{query}', '{passage}', '{query}{query}{query}']", "names 'query' 5 times"),
        (ROW + f"template = ['{{query}}{{passage}}{'x' * 65_536}']", "expected at most 65,536"),
        (
            ROW + "template = ['{query} {passage}{instruction}']\ninstruction_format = '{instruction:>999999999}'",
            "instruction_format has the fields ['instruction>999999999']",
        ),
        (
            ROW + "template = ['{query} {passage}{instruction}']\ninstruction_format = '{instruction'",
            "braces of the text itself are doubled",
        ),
        (
            LIST + "passage_format = '{passage}{query:>999999999}'",
            "passage_format has the fields ['passage', 'query>999999999']",
        ),
        (LIST + "passage_format = '{passage}{passage}'", "passage_format has the fields ['passage', 'passage']"),
        (ROW + "head = 'vocabulary'", "yes is missing"),
        (ROW + "yes = 'yes'", "yes and no belong to a vocabulary head"),
        (ROW + "head = 'score'\ntemplate = ['{query}{passage}']", "needs left"),
        (ROW + "num_labels = 3", "num_labels is 3"),
        (ROW + "temperature = 0", "temperature is 0; expected `float` > 0.0"),
        (ROW + ROW, "'me/mine' has two profiles"),
        (ROW + "golden = [1.0]", "golden is [1.0]; expected `object`"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(tmp_path: Path, change: str, said: str) -> None:
    (tmp_path / "mine.toml").write_text(change)
    with pytest.raises(CheckpointError) as caught:
        Profile.named("me/mine", str(tmp_path / "mine.toml"))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "mine.toml"))


def test_a_file_without_the_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(ROW + ROW.replace("me/mine", "me/other"))
    with pytest.raises(CheckpointError, match="has profiles for me/mine, me/other; none for 'x/y'"):
        Profile.named("x/y", str(path))
    other = Profile.named("me/other", str(path))
    assert other is not None
    assert other.model == "me/other"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Profile.named("x/y", str(tmp_path / "none.toml"))
    with pytest.raises(CheckpointError, match="profile is 'nobody'; expected a TOML file, 'generic', or one of"):
        Profile.named("x/y", "nobody")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("sigmoid", 512)),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, ("identity", 512)),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, ("identity", 512)),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, ("sigmoid", 512)),
        ({"model_type": "modernbert", "max_position_embeddings": 32_768}, ("sigmoid", 8192)),
    ],
)
def test_a_generic_profile_is_what_the_configuration_says(config: dict[str, object], expected: tuple[str, int]) -> None:
    base = {"architectures": ["XForSequenceClassification"], "model_type": "bert", "id2label": {"0": "LABEL_0"}}
    profile = Profile.generic("x/y", base | config, Path("x/y"))
    assert (profile.activation, profile.max_tokens) == expected


def test_a_row_is_plain_values() -> None:
    assert Profile(model="x", architectures=("A",)) == Profile(model="x", architectures=("A",))
    golden = builtin_profiles()["Qwen/Qwen3-Reranker-0.6B"]
    assert golden.golden == (-3.1093, 7.1204, -0.3788, 3.5416)
    assert golden.golden_are_margins
    assert builtin_profiles()["Qwen/Qwen3-Reranker-4B"].golden == ()
