"""Hostile Unicode over every interface; the longer one is `python -m benchmarks.reliability unicode`."""

from __future__ import annotations

import unicodedata

import pytest

from benchmarks.reliability import unicode


def test_texts_of_every_general_category() -> None:
    texts = unicode.odd_texts(600, 0)
    assert texts[0] == ""
    assert {len(text) for text in texts} == {0, 1, 2, 3}
    categories = {unicodedata.category(character) for text in texts for character in text}
    assert len(categories) == 29  # all but Cs, which no UTF-8 holds
    assert texts == unicode.odd_texts(600, 0) != unicode.odd_texts(600, 1)


@pytest.mark.parametrize("model", unicode.MODELS)
def test_an_odd_text_has_its_own_score_or_status_and_costs_no_neighbour(model: str) -> None:
    rows = unicode.run(31, 7, [model])
    assert len(rows) == (17 if model.startswith("states") else 11)
    for row in rows:
        assert (row["odd text differs"], row["neighbour differs"], row["server error"]) == (0, 0, 0), row
        assert row["scored"] + row["empty"] == 31
        assert row["empty"] >= 1
        assert row["scored"] >= 1
