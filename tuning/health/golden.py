"""Scores that publishers give for their own weights, and whether these weights give them. Knows texts and numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from decoder_server.cross_encoder.choosing import named_profile
from tuning.health.limits import MAX_GOLDEN_LOGIT_DELTA, MAX_GOLDEN_SCORE_DELTA
from tuning.health.pairs import TextTriple
from tuning.health.report import Finding, Section, State
from tuning.health.scorer import Scorer

TITLE = "published scores"


@dataclass(frozen=True)
class Golden:
    """Texts, what was published for them, and whether that is a logit."""

    source: str
    texts: tuple[TextTriple, ...]
    expected: tuple[float, ...]
    are_margins: bool
    max_delta: float


_PLANETS = tuple(
    TextTriple("Which planet is known as the Red Planet?", None, passage)
    for passage in (
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    )
)
_CTXL = tuple(
    TextTriple("What are the health benefits of exercise?", "Prioritize recent medical research", passage)
    for passage in (
        "A 2024 study shows exercise enhances cognitive function in older adults.",
        "Regular exercise reduces risk of heart disease and improves mental health.",
        "Ancient Greeks valued physical fitness for military training.",
    )
)
_CHINA = ("The capital of China is Beijing.", "Gravity attracts bodies toward one another.")
_CAPITAL = tuple(TextTriple("What is the capital of China?", None, passage) for passage in _CHINA)
_WEB = "Given a web search query, retrieve passages that answer the query."
_CAPITAL_WEB = tuple(TextTriple("What is the capital of China?", _WEB, passage) for passage in _CHINA)

# The reference differs from itself by 0.06 between batch sizes in bfloat16; twice that for another machine.
_KALM_DELTA = 0.12
_BY_ID = {
    # Its card, bfloat16.
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b": [
        Golden("its card", _CTXL, (-2.2969, -4.6875, -12.375), True, MAX_GOLDEN_LOGIT_DELTA)
    ],
    # Their cards, bfloat16 at r = 4; the second of Nano's is the logit of .9972850 and 5.896418e-07.
    "KaLM-Embedding/KaLM-Reranker-V1-Nano": [
        Golden("its card", _CAPITAL, (8.78125, -14.1875), True, _KALM_DELTA),
        Golden("its card, with an instruction", _CAPITAL_WEB, (5.90625, -14.34375), True, _KALM_DELTA),
    ],
    "KaLM-Embedding/KaLM-Reranker-V1-Large": [Golden("its card", _CAPITAL, (8.5625, -12.21875), True, _KALM_DELTA)],
}


def published(name: str) -> list[Golden]:
    """What is published for the model of exactly this hub id, or a directory `owner/name`; nothing for others."""
    own = _owner_and_name(name)
    if own in _BY_ID:
        return _BY_ID[own]
    profile = named_profile(own, None)
    if profile is None or not profile.golden:
        return []
    logits = profile.golden_are_margins or any(not 0 <= score <= 1 for score in profile.golden)
    most = MAX_GOLDEN_LOGIT_DELTA if logits else MAX_GOLDEN_SCORE_DELTA
    return [Golden("four passages", _PLANETS, profile.golden, profile.golden_are_margins, most)]


def golden_section(name: str, scorer: Scorer) -> Section:
    """Published scores against the model's own."""
    found = published(name)
    if not found:
        finding = Finding("scores", State.SKIP, detail="none for a model of this name")
        return Section(TITLE, [finding])
    return Section(TITLE, [_finding(golden, scorer) for golden in found])


def _finding(golden: Golden, scorer: Scorer) -> Finding:
    margins = scorer.margins(golden.texts)
    got = margins if golden.are_margins else scorer.scores(margins)
    delta = float(np.abs(got - np.array(golden.expected, dtype=np.float32)).max())
    state = State.PASS if delta <= golden.max_delta else State.FAIL
    shown = ", ".join(f"{value:.4g}" for value in got)
    wanted = ", ".join(f"{value:.4g}" for value in golden.expected)
    return Finding(golden.source, state, delta, f"at most {golden.max_delta:g}", f"{shown}; published {wanted}")


def _owner_and_name(name: str) -> str:
    """`owner/name` of a hub cache's snapshot or of a directory laid out like the hub; else the name itself."""
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", name)
    return f"{cached[1]}/{cached[2]}" if cached is not None else "/".join(name.rstrip("/").split("/")[-2:])
