"""The whole check of one model, loaded as it would be served, or loaded already (`preread serve --check`).

report = check(ModelConfig("BAAI/bge-reranker-v2-m3", dtype="bfloat16"))
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache import DEFAULT_CODEC
from checkpoint.files import CheckpointError, read_json, resolve
from decoder_server.config import NO_KV_CACHES, ModelConfig
from decoder_server.models.backend import Backend
from decoder_server.models.cross_encoder.backend import CrossEncoder
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.profiles import Profile
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.loading import is_fbnl, load_model
from tuning import EvaluationError
from tuning.health import checks, faults
from tuning.health.checks import BFLOAT16, FLOAT32, INT8, POOLED, Tolerance
from tuning.health.faults import Evidence, PlainModel
from tuning.health.report import CheckLine, HealthReport, Section, Verdict
from tuning.health.scorers import MIN_PAIRS, CrossScorer, FbnlScorer, Margins, PairSet, Scorer
from tuning.progress import SILENT, StageProgress, counted

_FLOAT32_NAMES = ("fp32", "float32")
_NARROW = "bfloat16"
_FEW_PAIRS = 20  # 20 to 100 pairs are a good number; fewer are used, and the report says so
_NUM_FARTHEST = 3
# Codecs that round numbers; the others approximate vectors, as int8 weights do.
_CODEC_TOLERANCE = {"Flat": FLOAT32, "SQfp16": BFLOAT16, "SQbf16": BFLOAT16}


def check(
    model: ModelConfig | str | Path,
    *,
    against: str = "fp32",
    pairs: PairSet | None = None,
    codec: str | None = None,
    ratio: int | None = None,
    progress: StageProgress = SILENT,
) -> HealthReport:
    """Loads a model as it would be served and checks its scores.

    `against`: fp32, the same weights in float32; or another directory or hub id, whose float32 scores it must give.
    `pairs`: None: the built-in hundred. `codec`, `ratio`: how passages are stored; fbnl only. Raises CheckpointError,
    ValueError: not to be loaded, or without a setting that is given; EvaluationError: pairs that it cannot score.
    """
    config = model if isinstance(model, ModelConfig) else ModelConfig(str(model))
    kind, foreign = "fbnl checkpoints", dict[str, object](codec=codec, ratio=ratio)
    if is_fbnl(config):
        kind, other_runtime = "cross-encoders", config.runtime != "torch"
        foreign = {"runtime": other_runtime, "profile": config.profile, "max_tokens": config.max_passage_tokens}
    for name, value in foreign.items():
        if value:
            raise EvaluationError(f"{name} is for {kind}; this model is none")
    backend, trust = load_model(replace(config, kv_caches=NO_KV_CACHES)), config.trust_remote_code
    one = _Check(_scorer(backend, ratio), pairs or PairSet.read(), progress)
    if against not in _FLOAT32_NAMES:
        options: dict[str, Any] = {"device": config.device, "trust_remote_code": trust, "kv_caches": NO_KV_CACHES}
        one.other = (against, _scorer(load_model(ModelConfig(against, dtype="float32", **options))))
    if isinstance(one.served, FbnlScorer):
        return _check_fbnl(one, one.served, codec or DEFAULT_CODEC)
    return _check_cross(one, one.served, trust)


def health_gate(model: Backend, *, pairs: PairSet | None = None, progress: StageProgress = SILENT) -> HealthReport:
    """Checks a loaded model, whatever its runtime, against float32 torch of the same weights, which it loads once more.

    Call it from the thread that the model is scored on, before any request is scored.
    """
    one = _Check(_scorer(model), pairs or PairSet.read(), progress)
    if isinstance(one.served, FbnlScorer):
        return _check_fbnl(one, one.served, DEFAULT_CODEC, every_format=False)
    return _check_cross(one, one.served)


def _scorer(model: Backend, ratio: int | None = None) -> FbnlScorer | CrossScorer:
    if isinstance(model, FbnlBackend):
        return FbnlScorer(model, ratio)
    if not isinstance(model, CrossEncoder):
        raise TypeError(f"{type(model).__name__} is no backend that can be checked")
    return CrossScorer(model)


@dataclass
class _Check:
    served: FbnlScorer | CrossScorer
    pairs: PairSet
    progress: StageProgress
    other: tuple[str, Scorer] | None = None  # another model, by name, whose margins this one must give too
    notes: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)  # of comparisons that failed
    started: float = field(default_factory=time.monotonic)

    def begin(self) -> Margins:
        """Margins of the model as it is served, and the section about it alone."""
        margins = self.score(f"served, {self.served.number_format}", self.served)
        self.sections.append(checks.behaviour(self.served, self.pairs.pairs, margins))
        return margins

    def score(self, stage: str, scorer: Scorer | PlainModel) -> Margins:
        with counted(self.progress, stage, len(self.pairs), "pairs") as advance:
            return scorer.margins(self.pairs.pairs, advance)

    def compare(
        self, title: str, served: Margins, reference: Margins, tolerance: Tolerance | None = None, cause: str = ""
    ) -> Section:
        """By default within the served number format's tolerance; `cause` is the likely one where it fails."""
        tolerance = tolerance or Tolerance.of(self.served.number_format)
        section = tolerance.compare(title, served, reference)
        self.sections.append(section)
        if section.failed and cause:
            self.causes.append(cause)
        return section

    def finish(self, margins: Margins, reference: Margins, *, compare_failed: bool) -> Evidence | None:
        """Compares with the other model, if any, and with published scores; the evidence where anything failed."""
        if self.other is not None:
            self.compare(f"against {self.other[0]}", margins, self.score("other", self.other[1]))
        lines = [one.line(self.served) for one in checks.published(self.served.name)]
        none = CheckLine("scores", Verdict.SKIP, detail="none for a model of this name")
        self.sections.append(Section("published scores", lines or [none]))
        if len(self.pairs) < _FEW_PAIRS:
            self.notes.append(f"only {len(self.pairs)} pairs: below {_FEW_PAIRS} one pair out of order decides")
        if not any(section.failed for section in self.sections):
            return None
        scores = self.served.scores(margins)
        return Evidence(self.pairs.pairs, margins, scores, reference, self.sections[0], compare_failed)

    def farthest(self, served: Margins, reference: Margins) -> list[dict[str, Any]]:
        """The pairs that differ most, most first, of those that both have a number for."""
        both = np.flatnonzero(np.isfinite(served) & np.isfinite(reference))
        delta = np.abs(served[both].astype(np.float64) - reference[both])
        most = both[np.argsort(-delta, kind="stable")[:_NUM_FARTHEST]].tolist()
        found = [(*self.pairs.pairs[i], float(served[i]), float(reference[i])) for i in most]
        return [{"query": q, "passage": p, "margin": margin, "expected": due} for q, _, p, margin, due in found]

    def report(self, *, against: str, **told: Any) -> HealthReport:
        return HealthReport(
            **told,
            against=self.other[0] if self.other is not None else against,
            model=self.served.name,
            pairs=self.pairs.name,
            num_pairs=len(self.pairs),
            sections=self.sections,
            notes=self.notes,
            seconds=time.monotonic() - self.started,
        )


def _check_cross(check: _Check, served: CrossScorer, trust_remote_code: bool = False) -> HealthReport:
    model, number_format = served.model, served.number_format
    _leave_out_unfit(check, model)
    margins = check.begin()
    reference = _reference(check, model, trust_remote_code)
    expected = check.score("plain float32", reference)
    own = check.compare(f"{number_format} against plain float32", margins, expected)
    evidence = check.finish(margins, expected, compare_failed=own.failed)
    causes: Sequence[str] = ()
    if evidence is not None:
        if not served.listwise:
            agrees = Tolerance.of(number_format).agree_alone(served, reference.margins, check.pairs.pairs)
            evidence = replace(evidence, alone_agrees=agrees)
        causes = evidence.causes(reference if isinstance(reference, PlainModel) else None)
        if causes == [faults.UNKNOWN]:  # the comparison alone may say more
            if not own.failed and check.other is not None:
                right = "its scores are right for its own weights and are not those of"
                causes = [f"{right} {check.other[0]}: other weights or template"]
            elif not own.failed:
                causes = [faults.UNPUBLISHED]
            elif number_format != "float32" and not own.failed_in(checks.DELTA, checks.SPREAD):
                causes = [f"{number_format} rounds by more than the pairs differ: serve these weights in float32"]
    return check.report(
        backend="cross_encoder",
        served=f"{model.runtime}, {model.dtype_name} on {model.device_name}, profile {model.profile.model}",
        against="plain float32",
        causes=causes,
        farthest=check.farthest(margins, expected) if own.failed else (),
    )


def _leave_out_unfit(check: _Check, model: CrossEncoder) -> None:
    """Keeps the pairs that the model can read, with a note about the others."""
    pairs, fitting, reason = check.pairs, [], ""
    for number, pair in enumerate(pairs.pairs, 1):
        try:
            model.read([pair])
            fitting.append(pair)
        except ValueError as exc:
            reason = reason or f"pair {number}: {exc}"
    num_others = len(pairs) - len(fitting)
    if len(fitting) < MIN_PAIRS:
        unfit = f"{num_others} of {len(pairs)} pairs do not fit {model.checkpoint_name}"
        raise EvaluationError(f"{unfit}; the first, {reason}")
    if num_others:
        check.notes.append(f"{num_others} pairs do not fit and are left out; the first, {reason}")
    check.pairs = PairSet(pairs.name, fitting)


def _reference(check: _Check, model: CrossEncoder, trust_remote_code: bool) -> PlainModel | CrossScorer:
    """The weights by the book: under the table's profile, or its file's, else the one that is served."""
    name, profile, directory = model.checkpoint_name, model.profile, resolve(model.checkpoint_name)
    try:
        own = Profile.named(name, directory=directory)
    except CheckpointError:  # its file is broken: only the served profile is left
        own = None
    if own is not None:
        profile = own.limited(read_json(directory / "config.json"), model.profile.max_tokens)
    if profile != model.profile:
        check.notes.append(f"served by the profile {model.profile.model}; compared with its own, {profile.model}")
    if not profile.listwise:
        return PlainModel(directory, profile, model.device_name, trust_remote_code)
    # The score is the list's: nothing plainer than the model itself.
    check.notes.append("listwise: scores depend on the other candidates of a request")
    return CrossScorer(open_cross_encoder(name, dtype="float32", profile=profile, trust_remote_code=trust_remote_code))


def _check_fbnl(check: _Check, served: FbnlScorer, codec: str, *, every_format: bool = True) -> HealthReport:
    """With `every_format` bfloat16 is compared with float32 even where float32 is served."""
    margins = check.begin()
    reference, narrow, format_failed = margins, None, False
    if served.number_format != "float32":
        reference, narrow = check.score("float32", served.in_format("float32")), margins
    elif every_format:
        narrow = check.score(_NARROW, served.in_format(_NARROW))
    if narrow is not None:
        too_narrow = f"{_NARROW} is too narrow for these weights: serve them in float32"
        section = check.compare(f"{_NARROW} against float32", narrow, reference, BFLOAT16, too_narrow)
        format_failed = section.failed and narrow is margins
    _compare_states(check, served, codec, margins)
    evidence = check.finish(margins, reference, compare_failed=format_failed)
    causes: Sequence[str] = ()
    if evidence is not None:  # faults that leave a mark, then the causes of the comparisons that failed
        causes = [cause for cause in evidence.causes(None) if cause != faults.UNKNOWN]
        if causes != [faults.NONE_FINITE]:
            causes = causes + check.causes or [faults.UNKNOWN]
    apart = evidence is not None and reference is not margins
    return check.report(
        backend="fbnl",
        served=f"{served.number_format} on {served.backend.device_name}, r = {served.ratio}, {codec}",
        against="float32, on demand",
        causes=causes,
        farthest=check.farthest(margins, reference) if apart else (),
    )


def _compare_states(check: _Check, served: FbnlScorer, codec: str, margins: Margins) -> None:
    """States that were stored, cached or pooled, against those encoded on demand, recomputed or unpooled."""
    texts, ratio = check.pairs.pairs, served.ratio
    with counted(check.progress, "stored, cached and pooled", 5 * len(texts), "pairs") as advance:
        on_demand, unpooled = served.states(texts), served.states(texts, 1)
        read = served.stored(on_demand, codec)
        stored = served.score(texts, read, advance)
        cached, cached_int8 = (served.cached(texts, read, form, advance) for form in ("auto", "int8"))
        fine = served.score(texts, unpooled, advance)
        pooled = served.score(texts, [one.at_ratio(ratio) for one in unpooled], advance)
    lossy = f"the codec {codec} loses too much: index with SQfp16, or a codec with more bits"
    tolerance = _CODEC_TOLERANCE.get(codec, INT8)
    check.compare(f"stored states ({codec}) against on demand", stored, margins, tolerance, lossy)
    check.compare("cached against recomputed", cached, stored, cause=_CACHED_WRONG)
    check.compare("cached as int8 against recomputed", cached_int8, stored, INT8, _CACHED_COARSE)
    check.compare(f"stored at r = 1, re-pooled to {ratio}", pooled, margins, cause=_UNEVEN)
    if ratio > 1:
        check.compare(f"r = {ratio} against r = 1", margins, fine, POOLED, _TOO_COARSE)


_CACHED_WRONG = "cached keys and values are not the recomputed ones: serve with the KV and prefix caches at 0 bytes"
_CACHED_COARSE = "int8 is too coarse for the KV and prefix caches: leave --cache-format at auto"
_UNEVEN = "pooling does not nest: states stored at one ratio are not those of another; index again with this version"
_TOO_COARSE = "the compression ratio is too high for this checkpoint: serve and store it at a lower one"
