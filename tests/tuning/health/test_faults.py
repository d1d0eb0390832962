"""A model served rightly is healthy; every known way to serve it wrongly is found and called by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from checkpoint import CheckpointError
from checkpoint.synthetic import make_checkpoint
from decoder_server.config import ModelConfig
from decoder_server.models.backend import sigmoid
from decoder_server.models.cross_encoder.backend import CrossEncoder
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.templates import TextPair, Texts
from decoder_server.models.loading import load_model
from preread_cli.main import cli
from preread_cli.process import checked
from tuning.health import HealthReport, PairSet, Verdict, check, health_gate
from tuning.health.checks import saturation

Margins = NDArray[np.float32]


class Planted(CrossEncoder):
    """A real model whose margins, scores or tokens pass through a fault on their way out."""

    def __init__(
        self,
        real: CrossEncoder,
        *,
        margins: Callable[[Margins], Margins] | None = None,
        activation: Callable[[Margins], Margins] | None = None,
        cut_right: bool = False,
    ) -> None:
        self.__dict__.update(real.__dict__)
        self._spoil, self._publish, self._cut_right = margins, activation, cut_right

    def read(self, texts: Sequence[Texts]) -> list[TextPair]:
        read = super().read(texts)
        if self._cut_right:  # as a tokenizer does that knows nothing of templates
            whole = PairwithoutLimit(self)
            read = [whole(text) for text in texts]
        return read

    def score(self, pairs: Sequence[TextPair]) -> Margins:
        margins = super().score(pairs)
        return self._spoil(margins) if self._spoil is not None else margins

    def activation(self, margins: Margins) -> Margins:
        return self._publish(margins) if self._publish is not None else super().activation(margins)


class PairwithoutLimit:
    """Fills the template with the whole passage and cuts the result from the right."""

    def __init__(self, model: CrossEncoder) -> None:
        from decoder_server.models.cross_encoder.templates import PairReader

        reader = model._reader
        self._max_tokens = model.profile.max_tokens
        self._reader = PairReader(reader.tokenizers.exact, replace(model.profile, max_tokens=1_000_000))

    def __call__(self, text: Texts) -> TextPair:
        (pair,) = self._reader.read([text])
        return replace(pair, ids=pair.ids[: self._max_tokens])


def open_float32(directory: Path, **settings: Any) -> CrossEncoder:
    return open_cross_encoder(directory, device="cpu", dtype="float32", **settings)


@pytest.fixture
def gate(some_pairs: PairSet) -> Callable[[CrossEncoder], HealthReport]:
    return lambda model: health_gate(model, pairs=some_pairs)


def assert_named(report: HealthReport, words: str) -> None:
    assert not report.passed
    assert report.causes, report.summary()
    assert report.causes[0].startswith(words), report.causes[0]


@pytest.mark.parametrize("kind", ["bert", "roberta", "causal"])
def test_a_model_served_rightly_is_healthy(
    kind: str, request: pytest.FixtureRequest, gate: Callable[[CrossEncoder], HealthReport]
) -> None:
    profile = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b" if kind == "causal" else None
    report = gate(open_float32(request.getfixturevalue(kind), profile=profile))

    assert report.passed, report.summary()
    assert report.causes == ()
    assert report.line("the model alone", "the query counts").state is Verdict.PASS


def test_a_softmax_over_the_hidden_vector_is_named(bert: Path, gate: Callable[[CrossEncoder], HealthReport]) -> None:
    model = open_float32(bert)
    base = model._runner.body.model.base_model

    def of_hidden(pairs: Sequence[TextPair]) -> Margins:
        rows = []
        for pair in pairs:
            types = torch.tensor([pair.type_ids]) if pair.type_ids else None
            with torch.inference_mode():
                hidden = base(input_ids=torch.tensor([pair.ids]), token_type_ids=types).last_hidden_state[0, 0]
            rows.append(float(hidden.softmax(-1)[0]))
        return np.array(rows, dtype=np.float32)

    model._runner.margins = of_hidden
    assert_named(gate(model), "softmax over the hidden vector")


def test_scores_that_all_vanish_are_a_softmax_too(bert: Path, gate: Callable[[CrossEncoder], HealthReport]) -> None:
    """As at a real width, where one of a thousand classes gets next to nothing."""
    model = open_float32(bert)
    vanishing = Planted(model, margins=lambda m: sigmoid(m) * 1e-7)
    assert_named(gate(vanishing), "softmax over the hidden vector")


def test_a_sigmoid_taken_twice_is_named(bert: Path, gate: Callable[[CrossEncoder], HealthReport]) -> None:
    model = open_float32(bert)
    assert model.profile.activation == "sigmoid"
    in_the_runtime = Planted(model, margins=sigmoid)
    assert_named(gate(in_the_runtime), "double sigmoid")
    when_published = Planted(model, activation=lambda m: sigmoid(sigmoid(m)))
    assert_named(gate(when_published), "double sigmoid")


def test_a_sigmoid_of_a_raw_logit_is_named(causal: Path, gate: Callable[[CrossEncoder], HealthReport]) -> None:
    raw = open_float32(causal, profile="ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b")
    assert_named(gate(Planted(raw, margins=sigmoid)), "sigmoid where the logit is expected")


BARE = """
[[profile]]
models = ["bare"]
architectures = ["Qwen3ForSequenceClassification"]
head = "score"
padding = "left"
template = ["{query}\\n{passage}"]
"""


def test_a_missing_template_is_named(causal: Path, tmp_path: Path, some_pairs: PairSet) -> None:
    from decoder_server.models.cross_encoder.conversion import CausalSource, staged

    with staged(tmp_path / "converted") as folder:
        CausalSource.open(str(causal)).convert(folder)
    (tmp_path / "bare.toml").write_text(BARE)

    converted = ModelConfig(str(tmp_path / "converted"), dtype="float32")
    assert check(converted, pairs=some_pairs).passed
    report = check(replace(converted, profile=str(tmp_path / "bare.toml")), pairs=some_pairs)
    assert_named(report, "missing template")
    assert any("compared with its own" in note for note in report.notes)


LEFT = """
[[profile]]
models = ["left"]
architectures = ["BertForSequenceClassification"]
activation = "sigmoid"
padding = "left"
max_tokens = 512
"""


def test_padding_on_the_wrong_side_is_named(bert: Path, tmp_path: Path, some_pairs: PairSet) -> None:
    (tmp_path / "left.toml").write_text(LEFT)
    report = check(ModelConfig(str(bert), dtype="float32", profile=str(tmp_path / "left.toml")), pairs=some_pairs)

    assert_named(report, "wrong padding side")
    assert report.line("the model alone", "alone or batched").state is Verdict.FAIL


def test_a_server_asked_to_check_does_not_start_with_it(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "left.toml").write_text(LEFT)
    load = checked(load_model)
    assert load(ModelConfig(str(bert), dtype="float32")).name == "cross_encoder"
    with pytest.raises(CheckpointError, match=r"NOT healthy.*wrong padding side"):
        load(ModelConfig(str(bert), dtype="float32", profile=str(tmp_path / "left.toml")))


def test_a_model_not_run_as_published_is_checked_once(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = checked(load_model, every=False, passed=tmp_path / "health")
    load(ModelConfig(str(bert), dtype="float32"))
    assert capsys.readouterr().out == ""
    load(ModelConfig(str(bert), dtype="float32", runtime="onnx"))
    assert "scores are healthy" in capsys.readouterr().out
    load(ModelConfig(str(bert), dtype="float32", runtime="onnx"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_dropped_pooler_is_named(
    kind: str, request: pytest.FixtureRequest, gate: Callable[[CrossEncoder], HealthReport]
) -> None:
    model = open_float32(request.getfixturevalue(kind))
    served = model._runner.body.model
    if kind == "bert":
        served.bert.pooler.forward = lambda states: states[:, 0]
    else:
        served.classifier.forward = lambda states: served.classifier.out_proj(states[:, 0])
    assert_named(gate(model), "dropped pooler")


def test_a_query_cut_from_the_right_is_named(causal: Path, gate: Callable[[CrossEncoder], HealthReport]) -> None:
    model = open_float32(causal, profile="ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b")
    report = gate(Planted(model, cut_right=True))

    assert not report.passed
    assert any(cause.startswith("the query is cut off") for cause in report.causes)
    assert report.line("the model alone", "the query counts").value == 0


def test_numbers_that_overflow_and_heads_that_see_nothing_are_named(
    bert: Path, gate: Callable[[CrossEncoder], HealthReport]
) -> None:
    model = open_float32(bert)
    assert_named(gate(Planted(model, margins=np.zeros_like)), "every pair has the same score")

    def first_overflows(margins: Margins) -> Margins:
        """Of each pass, so that there are both kinds whatever the model says."""
        return np.concatenate([[np.float32(np.inf)], margins[1:]])

    report = gate(Planted(model, margins=first_overflows))
    assert_named(report, "some scores are not finite")
    assert 0 < report.line("the model alone", "finite").value < 1
    json.loads(report.to_json())


NOTHING = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("where", ["margins", "activation"])
@pytest.mark.parametrize("number", NOTHING)
def test_a_model_without_one_finite_score_is_told_so_plainly(
    bert: Path, gate: Callable[[CrossEncoder], HealthReport], where: str, number: str
) -> None:
    """Without a warning of numpy's on the way, which the tests take for errors, and in a document that can be read."""
    report = gate(Planted(open_float32(bert), **{where: lambda m: np.full_like(m, NOTHING[number])}))
    assert_named(report, "the scores are not finite, not one of them")
    assert report.line("the model alone", "finite").detail == "not finite: no pair has a number"
    assert "not finite" in report.summary()
    assert json.loads(report.to_json())["causes"] == list(report.causes)


@pytest.mark.parametrize(("half", "code"), [("decoder", 1), ("encoder", 2), ("classifier", 1)])
def test_weights_that_overflow_are_not_finite_in_the_commands_words(
    tmp_path: Path, bert: Path, half: str, code: int
) -> None:
    directory = tmp_path / "spoilt"
    if half == "classifier":
        shutil.copytree(bert, directory)
    else:
        make_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in (name for name in tensors if f"{half}.norm" in name or f"{half}.weight" in name):
        tensors[name].fill_(3e38)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    answer = CliRunner().invoke(
        cli, ["check", str(directory), "--dtype", "float32", "--json-file", str(tmp_path / "json")]
    )
    assert answer.exit_code == code, answer.output
    assert "not finite" in answer.output
    assert not isinstance(answer.exception, ValueError | RuntimeWarning)


def test_other_weights_are_not_given_a_name(bert: Path, gate: Callable[[CrossEncoder], HealthReport]) -> None:
    noise = np.random.default_rng(0)
    model = Planted(open_float32(bert), margins=lambda m: m + noise.normal(size=len(m)).astype(np.float32) * 9)
    report = gate(model)
    assert not report.passed


def test_the_marks_of_saturation() -> None:
    assert saturation(np.array([0.0, 9e-7])) == "tiny"
    assert saturation(np.array([-2.0, -13.0])) is None  # ctxl's raw logits
    assert saturation(np.array([0.5, 0.73])) == "doubled"
    assert saturation(np.array([0.49, 0.73])) is None
