"""Tiny random models that are served rightly; each test serves them wrongly in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.synthetic import Size, make_cross_encoder
from tuning.health import PairSet

SIZE = Size()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads its first token through a pooler."""
    return make_cross_encoder(tmp_path_factory.mktemp("health") / "bert", "BertForSequenceClassification", SIZE)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads its first token through a dense layer of its head."""
    return make_cross_encoder(tmp_path_factory.mktemp("health") / "xlmr", "XLMRobertaForSequenceClassification", SIZE)


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in ctxl's shape."""
    return make_cross_encoder(tmp_path_factory.mktemp("health") / "causal", "Qwen3ForCausalLM", SIZE)


@pytest.fixture(scope="session")
def some_pairs() -> PairSet:
    """Every fourth of the built-in pairs: all languages, with and without instructions."""
    return PairSet("a quarter", PairSet.read().pairs[::4])
