from __future__ import annotations

import pytest

from training.collections import TASKS, aspect_of, topic_of


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (
            "What are the symptoms of Adult Acute Lymphoblastic Leukemia ?",
            ("symptoms", "Adult Acute Lymphoblastic Leukemia"),
        ),
        ("Is Lynch syndrome inherited ?", ("inheritance", "Lynch syndrome")),
        ("What is (are) Q Fever ?", ("overview", "Q Fever")),
        ("Do you have information about Anthrax", None),
    ],
)
def test_aspect_of(question: str, found: tuple[str, str] | None) -> None:
    assert aspect_of(question) == found


def test_questions_on_one_topic_share_its_key() -> None:
    assert topic_of("What causes Q Fever ?") == topic_of("How to prevent Q fever ?") == "q fever"


def test_opposed_wordings_share_no_text_with_the_others() -> None:
    others = {w for task, wordings in TASKS.items() if task != "opposed" for w in wordings}
    assert not others & set(TASKS["opposed"])
