"""The check of a cross-encoder: by itself, against the plain model, published scores, and what went wrong.

The check of an fbnl checkpoint: by itself, its number format, its stored states, its pooling, published margins.

The whole check of one model, and the same for one that is loaded already.

    report = check("BAAI/bge-reranker-v2-m3", dtype="bfloat16")
    report = health_gate(backend)                                # what `preread serve --check` runs

Knows which comparisons a backend needs; the comparisons are its neighbours'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache import DEFAULT_CODEC
from checkpoint import Checkpoint
from checkpoint.files import CheckpointError, read_json, resolve
from checkpoint.model import MODEL_TYPE
from decoder_server.models.backend import Backend
from decoder_server.models.cross_encoder.backend import CrossEncoder
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.profiles import Profile, named_profile, own_profile
from decoder_server.models.fbnl.backend import FbnlBackend
from tuning import EvaluationError
from tuning.health.checks import (
    BATCH,
    BFLOAT16,
    DELTA,
    FLOAT32,
    INT8,
    POOLED,
    SPREAD,
    SWAP,
    Margins,
    Scorer,
    behaviour,
    failed,
    farthest,
    golden_section,
    judged,
    mixed,
    notes,
    one_by_one,
    tolerance_for,
)
from tuning.health.faults import NONE_FINITE, UNKNOWN, UNPUBLISHED, Evidence, PlainModel, name_causes
from tuning.health.pairs import MIN_PAIRS, PairSet, TextTriple, built_in_pairs
from tuning.health.report import HealthReport, Section
from tuning.health.scorers import CrossScorer, FbnlScorer, through_store
from tuning.progress import SILENT, Advance, StageProgress, counted, ignore


def check_cross(
    served: CrossScorer,
    pairs: PairSet,
    *,
    other: tuple[str, Scorer] | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress = SILENT,
) -> HealthReport:
    """Checks a loaded cross-encoder against the plain model of its own weights, read by its own profile.

    Args:
        other: another model, by name, whose margins this one must give too.

    Raises:
        CheckpointError: weights that cannot be loaded once more.
        EvaluationError: no pairs fit the model.
    """
    started = time.monotonic()
    model = served.model
    pairs, left_out = _fitting(model, pairs)
    texts = pairs.pairs
    with counted(progress, f"served, {served.number_format}", len(texts)) as advance:
        margins = served.margins(texts, advance)
    sections = [behaviour(served, texts, margins)]
    reference = _Reference(model, trust_remote_code)
    with counted(progress, "plain float32", len(texts)) as advance:
        expected = reference.margins(texts, advance)
    limits = tolerance_for(served.number_format)
    sections.append(judged(f"{served.number_format} against plain float32", margins, expected, limits))
    if other is not None:
        with counted(progress, "other", len(texts)) as advance:
            sections.append(judged(f"against {other[0]}", margins, other[1].margins(texts, advance), limits))
    sections.append(golden_section(model.checkpoint_name, served))
    causes: Sequence[str] = ()
    if any(section.failed for section in sections):
        evidence = Evidence(
            pairs=texts,
            margins=margins,
            scores=served.scores(margins),
            reference=expected,
            alone_agrees=None
            if served.listwise
            else _agrees(served, reference, mixed(texts), limits.max_delta_spreads or 1.0),
            batch_failed=failed(sections[:1], BATCH),
            swap_failed=failed(sections[:1], SWAP),
            compare_failed=sections[1].failed,
        )
        causes = name_causes(evidence, reference.plain)
        if causes == [UNKNOWN]:
            causes = _by_comparison(sections[1], served.number_format, other)
    return HealthReport(
        model=model.checkpoint_name,
        backend="cross_encoder",
        served=f"{model.runtime}, {model.dtype_name} on {model.device_name}, profile {model.profile.model}",
        against=other[0] if other is not None else "plain float32",
        pairs=pairs.name,
        num_pairs=len(pairs),
        sections=sections,
        causes=causes,
        farthest=farthest(pairs, margins, expected) if sections[1].failed else (),
        notes=[*left_out, *notes(pairs), *reference.notes],
        seconds=time.monotonic() - started,
    )


def _by_comparison(own: Section, number_format: str, other: tuple[str, Scorer] | None) -> list[str]:
    """What failing says by itself, where no known fault gives the numbers."""
    if not own.failed:
        if other is None:
            return [UNPUBLISHED]
        return [f"its scores are right for its own weights and are not those of {other[0]}: other weights or template"]
    narrow = number_format != "float32" and not any(failed([own], name) for name in (DELTA, SPREAD))
    return (
        [f"{number_format} rounds by more than the pairs differ: serve these weights in float32"]
        if narrow
        else [UNKNOWN]
    )


def _fitting(model: CrossEncoder, pairs: PairSet) -> tuple[PairSet, list[str]]:
    """The pairs whose query and instruction the model can read, and a note about the others."""
    fitting, reason = [], ""
    for number, pair in enumerate(pairs.pairs, 1):
        try:
            model.read([pair.fields()])
        except ValueError as exc:
            reason = reason or f"pair {number}: {exc}"
        else:
            fitting.append(pair)
    num_others = len(pairs) - len(fitting)
    if len(fitting) < MIN_PAIRS:
        raise EvaluationError(
            f"{num_others} of {len(pairs)} pairs do not fit {model.checkpoint_name}; the first, {reason}"
        )
    note = f"{num_others} pairs do not fit and are left out; the first, {reason}"
    return PairSet(pairs.name, fitting), [note] if num_others else []


class _Reference:
    """What the weights say by the book, under the profile that the checkpoint goes by when nobody gives another."""

    def __init__(self, model: CrossEncoder, trust_remote_code: bool) -> None:
        directory = resolve(model.checkpoint_name)
        profile = _own(model)
        self.notes = (
            [f"served by the profile {model.profile.model}; compared with its own, {profile.model}"]
            if profile != model.profile
            else []
        )
        self.plain: PlainModel | None = None
        if profile.listwise:  # the score is the list's: nothing plainer than the model itself
            self.notes.append("listwise: scores depend on the other candidates of a request")
            self._same = CrossScorer(
                open_cross_encoder(
                    model.checkpoint_name, dtype="float32", profile=profile, trust_remote_code=trust_remote_code
                )
            )
        else:
            self.plain = PlainModel(directory, profile, model.device_name, trust_remote_code)

    def margins(self, texts: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        if self.plain is None:
            return self._same.margins(texts, advance)
        return self.plain.margins(self.plain.read(texts), advance)


def _own(model: CrossEncoder) -> Profile:
    """The profile of the table or of the checkpoint's own file; the served one where there is neither."""
    directory = resolve(model.checkpoint_name)
    try:
        own = named_profile(model.checkpoint_name, None) or own_profile(directory)
    except CheckpointError:  # its own file is broken: what serves is all there is
        own = None
    if own is None:
        return model.profile
    return own.limited(read_json(directory / "config.json"), model.profile.max_tokens)


def _agrees(served: CrossScorer, reference: _Reference, some: Sequence[TextTriple], spreads: float) -> bool:
    """Whether unpadded passes of what is served give the reference's margins."""
    alone, expected = one_by_one(served, some), reference.margins(some)
    if not (np.isfinite(alone).all() and np.isfinite(expected).all()):
        return False
    return bool(np.abs(alone - expected).max() <= spreads * expected.std())


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
    progress: StageProgress = SILENT,
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
    own, narrow = tolerance_for(served.number_format), margins
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


FLOAT32_NAMES = ("fp32", "float32")


def check(
    model: str | Path,
    *,
    against: str = "fp32",
    pairs: PairSet | None = None,
    device: str | None = None,
    dtype: str | None = None,
    runtime: str = "torch",
    profile: str | None = None,
    codec: str | None = None,
    ratio: int | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
    read_control_tokens: bool = False,
    progress: StageProgress = SILENT,
) -> HealthReport:
    """Loads a model as it would be served and checks its scores.

    Args:
        against: fp32, the same weights in float32; or another directory or hub id, whose float32 scores it must give.
        pairs: None: the built-in hundred.
        codec, ratio: how passages are stored; fbnl only.
        read_control_tokens: in texts, as KaLM's own code does; fbnl only.
        runtime, profile, max_tokens, trust_remote_code: of cross-encoders only.

    Raises:
        CheckpointError, ValueError: a model that cannot be loaded, or a setting that it does not have.
        EvaluationError: pairs that it cannot score at all.
    """
    name, given = str(model), pairs or built_in_pairs()
    other = None if against in FLOAT32_NAMES else against
    if is_fbnl(name):
        _refuse("cross-encoders", runtime=runtime != "torch", profile=profile, max_tokens=max_tokens)
        checkpoint = Checkpoint.open(name, neutralise=not read_control_tokens)
        backend = FbnlBackend.load(checkpoint, device=device, dtype=dtype)
        beside = _open_other(other, device, trust_remote_code) if other is not None else None
        return check_fbnl(
            FbnlScorer.beside(backend, checkpoint, ratio),
            checkpoint,
            given,
            codec=codec,
            other=beside,
            progress=progress,
        )
    _refuse("fbnl checkpoints", codec=codec, ratio=ratio, read_control_tokens=read_control_tokens)
    loaded = open_cross_encoder(
        name,
        device=device,
        dtype=dtype,
        runtime=runtime,
        profile=profile,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
    )
    beside = _open_other(other, device, trust_remote_code) if other is not None else None
    return check_cross(CrossScorer(loaded), given, other=beside, trust_remote_code=trust_remote_code, progress=progress)


def health_gate(
    model: Backend,
    *,
    pairs: PairSet | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress = SILENT,
) -> HealthReport:
    """Checks a model that is loaded, whatever its runtime, against float32 torch of the same weights.

    Loads those weights once more while it runs. Call it from the thread that the model is scored on, before
    anybody else scores.
    """
    given = pairs or built_in_pairs()
    if isinstance(model, FbnlBackend):
        scorer = FbnlScorer.beside(model, model.checkpoint)
        return check_fbnl(scorer, model.checkpoint, given, every_format=False, progress=progress)
    if not isinstance(model, CrossEncoder):
        raise TypeError(f"{type(model).__name__} is no backend that can be checked")
    return check_cross(CrossScorer(model), given, trust_remote_code=trust_remote_code, progress=progress)


def is_fbnl(name: str) -> bool:
    """Whether a checkpoint is an encoder-decoder with stored states, and no cross-encoder.

    Raises:
        CheckpointError: neither a directory nor a hub id.
    """
    if named_profile(name, None) is not None:
        return False
    return read_json(resolve(name) / "config.json").get("model_type") == MODEL_TYPE


def _open_other(name: str, device: str | None, trust_remote_code: bool) -> tuple[str, Scorer]:
    if is_fbnl(name):
        return name, FbnlScorer.load(Checkpoint.open(name), device=device, dtype="float32")
    other = open_cross_encoder(name, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    return name, CrossScorer(other)


def _refuse(whose: str, **settings: Any) -> None:
    for name, value in settings.items():
        if value:
            raise EvaluationError(f"{name} is for {whose}; this model is none")
