"""The check of an fbnl checkpoint: by itself, its number format, its stored states, its pooling, published margins."""

from __future__ import annotations

import time

from cache.codecs import DEFAULT_CODEC
from checkpoint import Checkpoint
from tuning.health.behaviour import BATCH, SWAP, behaviour
from tuning.health.compare import Margins, farthest
from tuning.health.faults import Evidence, name_causes
from tuning.health.fbnl import FbnlScorer, through_store
from tuning.health.golden import golden_section
from tuning.health.limits import BFLOAT16, FLOAT32, INT8, POOLED, limits_for
from tuning.health.pairs import PairSet
from tuning.health.report import HealthReport
from tuning.health.running import counted, failed, judged, notes
from tuning.health.scorer import Scorer
from tuning.progress import SILENT, Progress

# Codecs that round numbers; the others approximate vectors, as int8 weights do.
CODEC_LIMITS = {"Flat": FLOAT32, "SQfp16": BFLOAT16, "SQbf16": BFLOAT16}
NARROW = "bfloat16"


def check_fbnl(
    served: FbnlScorer,
    checkpoint: Checkpoint,
    pairs: PairSet,
    *,
    codec: str | None = None,
    other: tuple[str, Scorer] | None = None,
    every_format: bool = True,
    progress: Progress = SILENT,
) -> HealthReport:
    """Checks one ratio and codec of a checkpoint.

    Args:
        codec: that collections are stored in; None: the default.
        other: another model, by name, whose margins this one must give too.
        every_format: compare bfloat16 with float32 even where float32 is served.

    Raises:
        EvaluationError: a passage that cannot be encoded at all.
        CacheError: a codec that cannot be had.
    """
    started = time.monotonic()
    texts, ratio = pairs.pairs, served.ratio
    codec = codec or DEFAULT_CODEC

    def score(stage: str, scorer: Scorer) -> Margins:
        with counted(progress, stage, len(texts)) as advance:
            return scorer.margins(texts, advance)

    margins = score(f"served, {served.number_format}", served)
    sections = [behaviour(served, texts, margins)]
    wide = served if served.number_format == "float32" else FbnlScorer.load(
        checkpoint, device=served.backend.device_name, dtype="float32", ratio=ratio
    )  # fmt: skip
    reference = margins if wide is served else score("float32", wide)
    if served.number_format != "float32":
        sections.append(judged(f"{served.number_format} against float32", margins, reference, BFLOAT16))
    elif every_format:
        narrow = FbnlScorer.load(checkpoint, device=served.backend.device_name, dtype=NARROW, ratio=ratio)
        sections.append(judged(f"{NARROW} against float32", score(NARROW, narrow), reference, BFLOAT16))
    with counted(progress, "stored and pooled", 3 * len(texts)) as advance:
        on_demand = served.states(texts)
        stored = served.score(texts, through_store(on_demand, served.encoder, ratio, codec), advance)
        sections.append(
            judged(f"stored states ({codec}) against on demand", stored, margins, CODEC_LIMITS.get(codec, INT8))
        )
        unpooled = served.states(texts, 1)
        fine = served.score(texts, unpooled, advance)
        again = served.score(texts, [one.at_ratio(ratio) for one in unpooled], advance)
    sections.append(judged(f"stored at r = 1, re-pooled to {ratio}", again, margins, limits_for(served.number_format)))
    if ratio > 1:
        sections.append(judged(f"r = {ratio} against r = 1", margins, fine, POOLED))
    if other is not None:
        name, scorer = other
        sections.append(judged(f"against {name}", margins, score("other", scorer), limits_for(served.number_format)))
    sections.append(golden_section(checkpoint.name, served))
    evidence = Evidence(
        pairs=texts,
        margins=margins,
        scores=served.scores(margins),
        reference=reference,
        alone_agrees=None,
        batch_failed=failed(sections[:1], BATCH),
        swap_failed=failed(sections[:1], SWAP),
        compare_failed=any(section.failed for section in sections[1:]),
    )
    healthy = not any(section.failed for section in sections)
    return HealthReport(
        model=checkpoint.name,
        backend="fbnl",
        served=f"{served.number_format} on {served.backend.device_name}, r = {ratio}, {codec}",
        against=other[0] if other is not None else "float32, on demand",
        pairs=pairs.name,
        num_pairs=len(pairs),
        sections=sections,
        causes=() if healthy else name_causes(evidence, None),
        farthest=() if healthy or wide is served else farthest(pairs, margins, reference),
        notes=notes(pairs),
        seconds=time.monotonic() - started,
    )
