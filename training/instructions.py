"""The instructions a checkpoint is trained to follow, in several wordings each, and their opposites."""

from __future__ import annotations

import re

DEFAULT = "Retrieve passages that answer the query"

TASKS: dict[str, tuple[str, ...]] = {
    "question": (
        "Given a question, retrieve passages that answer the question",
        "Find the passage that answers this question",
        "Retrieve answers to the medical question",
    ),
    "package": (
        "Given a short description, retrieve the package it describes",
        "Find the software package that fits the description",
        "Retrieve the full description of this software",
    ),
    "claim": (
        "Given a scientific claim, retrieve abstracts that support or refute the claim",
        "Find scientific evidence for or against the claim",
    ),
    "title": (
        "Given a title, retrieve the abstract of the paper",
        "Find research papers on this subject",
        "Retrieve abstracts about the topic",
    ),
    "sentence": (
        "Given a sentence, retrieve the document it belongs to",
        "Find documents about the same subject as the text",
    ),
    "opposed": (
        "Retrieve passages that do not answer the query",
        "Find passages that are not about the query",
        "Retrieve passages about something else than the query",
        "Given a query, retrieve passages from a different topic",
    ),
}

ASPECTS: dict[str, tuple[str, str]] = {  # name -> (how MedQuAD asks for it, how an instruction asks for it)
    "overview": (r"^what is \(are\) (.+?) ?\?$", "the definition and overview"),
    "symptoms": (r"^what are the symptoms of (.+?) ?\?$", "the symptoms"),
    "treatments": (r"^what are the treatments for (.+?) ?\?$", "the treatments"),
    "genetics": (r"^what are the genetic changes related to (.+?) ?\?$", "the genetic changes"),
    "causes": (r"^what causes (.+?) ?\?$", "the causes"),
    "inheritance": (r"^is (.+?) inherited ?\?$", "the inheritance"),
    "diagnosis": (r"^how to diagnose (.+?) ?\?$", "the diagnosis"),
    "frequency": (r"^how many people are affected by (.+?) ?\?$", "the number of people affected"),
    "outlook": (r"^what is the outlook for (.+?) ?\?$", "the outlook"),
    "risk": (r"^who is at risk for (.+?)\?? ?\?$", "who is at risk"),
    "prevention": (r"^how to prevent (.+?) ?\?$", "the prevention"),
}
ASPECT_WORDINGS = (
    "Retrieve passages about {aspect}",
    "Given a topic, find the passage that describes {aspect}",
    "Find passages on {aspect} of the query",
)


def aspect_of(question: str) -> tuple[str, str] | None:
    """(aspect, topic) of a MedQuAD question, or None: `What are the symptoms of X ?` -> (`symptoms`, `X`)."""
    for name, (pattern, _) in ASPECTS.items():
        match = re.match(pattern, question.strip(), re.IGNORECASE)
        if match:
            return name, match.group(1)
    return None


def topic_of(question: str) -> str:
    """What two questions must share to count as the same topic when the held-out part is cut."""
    found = aspect_of(question)
    text = found[1] if found else question
    return " ".join(re.findall(r"\w+", text.lower()))
