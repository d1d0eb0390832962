"""Laws of batches: nothing lost, nothing over the budget, never more padding than allowed."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder_worker.passage_encoder import BatchLimits, PassageEncoder

CORPUS = Path(__file__).parents[2] / "examples" / "scifact" / "corpus.jsonl.gz"


def padding(lengths: list[int], batches: list[list[int]]) -> float:
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded


@given(
    st.lists(st.integers(1, 2000), max_size=300),
    st.integers(1, 5000),
    st.floats(0, 0.5),
    st.integers(0, 2000),
)
def test_every_sequence_is_in_one_batch_within_the_limits(
    lengths: list[int], budget: int, share: float, free: int
) -> None:
    limits = BatchLimits(budget, share, free)
    batches = limits.plan(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch)
        wasted = padded - sum(lengths[i] for i in batch)
        assert len(batch) == 1 or padded <= budget
        assert wasted <= share * padded or padded <= free


@given(st.lists(st.integers(1, 1024), min_size=1, max_size=2000))
def test_padding_stays_under_five_percent_whatever_the_lengths(lengths: list[int]) -> None:
    assert padding(lengths, BatchLimits.for_device("cpu").plan(lengths)) <= 0.05


def test_raggedness_costs_few_batches() -> None:
    """One passage of every length: the bound on padding closes some dozens of batches more, not hundreds."""
    lengths = list(range(1, 1025))
    limits = BatchLimits.for_device("cpu")
    ragged = replace(limits, max_padding=0.99)
    assert len(limits.plan(lengths)) < len(ragged.plan(lengths)) + 60


def test_padding_on_real_passages(encoder: PassageEncoder, real_texts: list[str]) -> None:
    """Paragraphs of a manual, and the abstracts of the example corpus, in the window of an index run."""
    with gzip.open(CORPUS, "rt") as lines:
        abstracts = [json.loads(line)["text"] for line in lines]
    assert len(abstracts) >= 1000
    for texts in (real_texts[:1000], abstracts[:1000]):
        lengths = [text.num_tokens for text in encoder.tokenize(texts)]
        assert padding(lengths, encoder.limits.plan(lengths)) < 0.05


def test_a_sequence_over_the_budget_goes_alone() -> None:
    assert BatchLimits(4096).plan([10, 5000, 20]) == [[1], [2], [0]]


def test_sorted_by_length() -> None:
    assert BatchLimits(4096).plan([100, 50, 99, 51, 98]) == [[0, 2, 4], [3, 1]]


def test_a_gpu_pads_small_batches_rather_than_launch_more() -> None:
    assert len(BatchLimits.for_device("cuda:0").plan([100, 50, 10, 5])) == 1


@pytest.mark.parametrize("wrong", [{"max_batch_tokens": 0}, {"max_batch_tokens": 8, "max_padding": 1.0}])
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        BatchLimits(**wrong)
