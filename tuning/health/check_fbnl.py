"""The check of an fbnl checkpoint: by itself, its number format, its stored states, its pooling, published margins."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cache.codec_names import DEFAULT_CODEC
from checkpoint import Checkpoint
from tuning.health.behaviour import BATCH, SWAP, behaviour
from tuning.health.compare import Margins, farthest
from tuning.health.faults import NONE_FINITE, UNKNOWN, Evidence, name_causes
from tuning.health.fbnl import FbnlScorer, through_store
from tuning.health.golden import golden_section
from tuning.health.limits import BFLOAT16, FLOAT32, INT8, POOLED, limits_for
from tuning.health.pairs import PairSet
from tuning.health.report import HealthReport, Section
from tuning.health.running import counted, failed, judged, notes
from tuning.health.scorer import Scorer
from tuning.progress import SILENT, Progress

# Codecs that round numbers; the others approximate vectors, as int8 weights do.
CODEC_LIMITS = {"Flat": FLOAT32, "SQfp16": BFLOAT16, "SQbf16": BFLOAT16}
NARROW = "bfloat16"

TOO_NARROW = "bfloat16 is too narrow for these weights: serve them in float32"
TOO_LOSSY = "index with SQfp16, or a codec with more bits"
TOO_COARSE = "the compression ratio is too high for this checkpoint: serve and store it at a lower one"
KEPT_WRONG = "what is kept between passes is not what they compute: serve with the keys and prefix caches at 0 bytes"
KEPT_COARSE = "int8 is too coarse for what is kept between passes: leave --cache-format at auto"
UNEVEN = "pooling does not nest: states stored at one ratio are not those of another; index again with this version"


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
    alone = behaviour(served, texts, margins)
    wide = served
    if served.number_format != "float32":
        wide = FbnlScorer.load(checkpoint, device=served.backend.device_name, dtype="float32", ratio=ratio)
    reference = margins if wide is served else score("float32", wide)
    own, narrow = limits_for(served.number_format), margins
    if wide is served and every_format:
        other_format = FbnlScorer.load(checkpoint, device=served.backend.device_name, dtype=NARROW, ratio=ratio)
        narrow = score(NARROW, other_format)
    compared: list[tuple[Section, str]] = []  # and the likely cause where it fails
    if narrow is not reference:
        compared.append((judged(f"{NARROW} against float32", narrow, reference, BFLOAT16), TOO_NARROW))
    with counted(progress, "stored, kept and pooled", 5 * len(texts)) as advance:
        on_demand, unpooled = served.states(texts), served.states(texts, 1)
        read = through_store(on_demand, served.encoder, ratio, codec)
        stored = served.score(texts, read, advance)
        from_tiers = {form: served.kept(texts, read, form, advance) for form in ("auto", "int8")}
        fine = served.score(texts, unpooled, advance)
        again = served.score(texts, [one.at_ratio(ratio) for one in unpooled], advance)
    kept = CODEC_LIMITS.get(codec, INT8)
    title = f"stored states ({codec}) against on demand"
    compared.append((judged(title, stored, margins, kept), f"the codec {codec} loses too much: {TOO_LOSSY}"))
    compared.append((judged("kept between passes against fresh", from_tiers["auto"], stored, own), KEPT_WRONG))
    compared.append((judged("kept as int8 against fresh", from_tiers["int8"], stored, INT8), KEPT_COARSE))
    compared.append((judged(f"stored at r = 1, re-pooled to {ratio}", again, margins, own), UNEVEN))
    if ratio > 1:
        compared.append((judged(f"r = {ratio} against r = 1", margins, fine, POOLED), TOO_COARSE))
    if other is not None:
        name, scorer = other
        compared.append((judged(f"against {name}", margins, score("other", scorer), own), ""))
    sections = [alone, *(section for section, _ in compared), golden_section(checkpoint.name, served)]
    evidence = Evidence(
        pairs=texts,
        margins=margins,
        scores=served.scores(margins),
        reference=reference,
        alone_agrees=None,
        batch_failed=failed([alone], BATCH),
        swap_failed=failed([alone], SWAP),
        compare_failed=wide is not served and compared[0][0].failed,
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
        causes=() if healthy else _causes(evidence, compared),
        farthest=() if healthy or wide is served else farthest(pairs, margins, reference),
        notes=notes(pairs),
        seconds=time.monotonic() - started,
    )


def _causes(evidence: Evidence, compared: Sequence[tuple[Section, str]]) -> list[str]:
    """Faults that leave a mark, then what the comparison that failed says by itself."""
    marked = [cause for cause in name_causes(evidence, None) if cause != UNKNOWN]
    if marked == [NONE_FINITE]:
        return marked
    return marked + [words for section, words in compared if section.failed and words] or [UNKNOWN]
