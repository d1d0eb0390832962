"""One sentence for each thing a reader of the numbers should know. Computes counts, no measure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cache.codec_names import DEFAULT_CODEC
from cache.codecs import Codec
from cache.collection import Collection
from encoder_worker.target import num_training_states
from tuning.judged import JudgedCollection
from tuning.sweep.margins import Margins, Pairs
from tuning.sweep.quality import Judgements
from tuning.sweep.recode import Codecs
from tuning.sweep.spill import SpilledStates
from tuning.trec import RunFile


def notes(
    judged: JudgedCollection,
    candidates: RunFile | None,
    from_states: Collection | None,
    judgements: Judgements,
    pairs: Pairs,
    states: SpilledStates,
    reference: NDArray[np.float32],
    margins: Margins,
    codecs: Codecs,
    is_empty: Callable[[str], bool],
) -> list[str]:
    """In the order of the data: judgements, candidates, states, codecs, margins.

    Args:
        is_empty: whether a passage's text is empty to the model's tokenizer.
    """
    there = set(states.passage_ids)
    absent = pairs.places.keys() - there
    unread = {p for p in absent if not is_empty(judged.passages.get(p, ""))}
    grades = list(judged.qrels.values())
    unscored = sum(int(np.isnan(flat).sum()) for flat in margins.values.values()) - len(margins.values) * sum(
        len(places) for p, places in pairs.places.items() if p not in there
    )
    counted = (
        (len(judged.refused), "lines of the judged files cannot be used: left out"),
        (
            judged.num_judgements_of_unknown_queries,
            f"judgements name queries without a text ({len(judged.unknown_queries)} of them): left out",
        ),
        (
            sum(p not in judged.passages for own in grades for p in own) if judged.passages else 0,
            "judgements name passages that the collection does not have: relevant, and never found",
        ),
        (
            len(candidates.run.keys() - judged.queries.keys()) if candidates is not None else 0,
            "queries of the run have no text or no judgement: left out",
        ),
        (
            sum(max(own.values()) < judgements.min_grade for own in grades),
            "queries have no relevant passage: they count 0",
        ),
        (
            sum(not found for found in pairs.candidates.values()),
            "queries have no candidates: " + ("left out" if judgements.taught else "they count 0"),
        ),
        (states.num_not_finite, "candidate passages have states that are NaN or infinite: ranked last"),
        (len(absent) - len(unread) - states.num_not_finite, "candidate passages have no text or states: ranked last"),
        (len(unread), "candidate passages gave no states (NaN, infinite, or out of memory): ranked last"),
        (len(states.truncated & pairs.places.keys()), "candidate passages were read up to the passage limit only"),
        (unscored, "margins, over all configurations, were not finite: those candidates are ranked last"),
    )
    told = [f"{number:,} {text}" for number, text in counted if number > 0]
    if from_states is not None:
        manifest = from_states.manifest
        told.append(
            f"{manifest.collection} keeps no texts: the reference is its stored states (ratio "
            f"{manifest.compression_ratio}, {manifest.codec}), and codecs are laid over theirs"
        )
    told += [
        f"{factory} at stored ratio {ratio} is left out"
        f"{f', {DEFAULT_CODEC} stands in for it' if factory != DEFAULT_CODEC else ''}: {reason}"
        for (ratio, factory), reason in codecs.left_out.items()
    ]
    told += [
        f"{factory} was trained on few states: {', '.join(f'{n:,} at {r}' for r, n in sorted(few.items()))}. An index "
        f"run takes {num_training_states(Codec(factory, states.dim)):,} where it has them, and may do better"
        for factory, few in codecs.few.items()
    ]
    return told
