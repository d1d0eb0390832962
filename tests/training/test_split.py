from __future__ import annotations

import pytest

from training.collections import RawCollection, fraction, topic_of


def test_passages_join_their_queries_in_a_chain() -> None:
    """a-b share a passage, b-c another one, so a and c fall on one side too."""
    made = RawCollection("toy", {"1": "one", "2": "two"}, {}, {"a": "x", "b": "y", "c": "z", "d": "w"})
    made.passages["3"] = "three"
    made.qrels |= {"a": {"1": 1}, "b": {"1": 1, "2": 1}, "c": {"2": 1}, "d": {"3": 1}}
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert {"a", "b", "c"} & made.held_out(share) in (set(), {"a", "b", "c"})


def collection() -> RawCollection:
    made = RawCollection("toy")
    for i in range(200):
        name = "".join(chr(97 + (i // 26**k) % 26) for k in range(3))
        for aspect, question in (
            ("s", f"What are the symptoms of {name} ?"),
            ("t", f"What are the treatments for {name} ?"),
        ):
            made.queries[f"{i}{aspect}"] = question
            made.passages[f"p{i}{aspect}"] = f"{name} {aspect} text"
            made.qrels[f"{i}{aspect}"] = {f"p{i}{aspect}": 1}
    return made


def test_a_topic_falls_on_one_side_and_the_split_is_stable() -> None:
    made = collection()
    held = made.held_out(0.2, topic_of)
    assert held == made.held_out(0.2, topic_of)
    assert 0.1 < len(held) / len(made.queries) < 0.3
    for i in range(200):
        assert (f"{i}s" in held) == (f"{i}t" in held)


def test_near_duplicate_passages_fall_on_one_side() -> None:
    made = collection()
    for i in range(0, 200, 2):
        made.passages[f"p{i}s"] = f"Same words {i}."
        made.passages[f"p{i + 1}s"] = f"same   WORDS {i + 1}!"
    held = made.held_out(0.2, topic_of, max_component=1000)
    assert len({f"{i}s" in held for i in range(200)}) == 1


def test_a_giant_family_stays_in_training() -> None:
    made = collection()
    for passage_id in made.passages:
        made.passages[passage_id] = "one text"
    assert made.held_out(0.99, topic_of, max_component=60) == set()


@pytest.mark.parametrize(("key", "value"), [("a", 0.79), ("b", 0.24)])
def test_fraction_is_a_fixed_number(key: str, value: float) -> None:
    assert fraction(key) == pytest.approx(value, abs=0.01)
