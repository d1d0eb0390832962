"""The check of a cross-encoder: by itself, against the plain model, published scores, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from checkpoint.errors import CheckpointError
from checkpoint.files import read_json, resolve
from decoder_server.cross_encoder import CrossEncoder, Profile, open_cross_encoder
from decoder_server.cross_encoder.choosing import limited, named_profile, own_profile
from tuning.errors import EvaluationError
from tuning.health.behaviour import BATCH, SWAP, behaviour, mixed, one_by_one
from tuning.health.compare import DELTA, SPREAD, Margins, farthest
from tuning.health.cross import CrossScorer
from tuning.health.faults import UNKNOWN, UNPUBLISHED, Evidence, name_causes
from tuning.health.golden import golden_section
from tuning.health.limits import limits_for
from tuning.health.pairs import MIN_PAIRS, PairSet, TextTriple
from tuning.health.plain import PlainModel
from tuning.health.report import HealthReport, Section
from tuning.health.running import counted, failed, judged, notes
from tuning.health.scorer import Advance, Scorer, unheard
from tuning.progress import SILENT, Progress


def check_cross(
    served: CrossScorer,
    pairs: PairSet,
    *,
    other: tuple[str, Scorer] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
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
    limits = limits_for(served.number_format)
    sections.append(judged(f"{served.number_format} against plain float32", margins, expected, limits))
    if other is not None:
        with counted(progress, "other", len(texts)) as advance:
            sections.append(judged(f"against {other[0]}", margins, other[1].margins(texts, advance), limits))
    sections.append(golden_section(model.model, served))
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
        model=model.model,
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
            model.pair(*pair.fields())
        except ValueError as exc:
            reason = reason or f"pair {number}: {exc}"
        else:
            fitting.append(pair)
    num_others = len(pairs) - len(fitting)
    if len(fitting) < MIN_PAIRS:
        raise EvaluationError(f"{num_others} of {len(pairs)} pairs do not fit {model.model}; the first, {reason}")
    note = f"{num_others} pairs do not fit and are left out; the first, {reason}"
    return PairSet(pairs.name, fitting), [note] if num_others else []


class _Reference:
    """What the weights say by the book, under the profile that the checkpoint goes by when nobody gives another."""

    def __init__(self, model: CrossEncoder, trust_remote_code: bool) -> None:
        directory = resolve(model.model)
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
                open_cross_encoder(model.model, dtype="float32", profile=profile, trust_remote_code=trust_remote_code)
            )
        else:
            self.plain = PlainModel(directory, profile, model.device_name, trust_remote_code)

    def margins(self, texts: Sequence[TextTriple], advance: Advance = unheard) -> Margins:
        if self.plain is None:
            return self._same.margins(texts, advance)
        return self.plain.margins(self.plain.read(texts), advance)


def _own(model: CrossEncoder) -> Profile:
    """The profile of the table or of the checkpoint's own file; the served one where there is neither."""
    directory = resolve(model.model)
    try:
        own = named_profile(model.model, None) or own_profile(directory)
    except CheckpointError:  # its own file is broken: what serves is all there is
        own = None
    if own is None:
        return model.profile
    return limited(own, read_json(directory / "config.json"), model.profile.max_tokens)


def _agrees(served: CrossScorer, reference: _Reference, some: Sequence[TextTriple], spreads: float) -> bool:
    """Whether unpadded passes of what is served give the reference's margins."""
    alone, expected = one_by_one(served, some), reference.margins(some)
    if not (np.isfinite(alone).all() and np.isfinite(expected).all()):
        return False
    return bool(np.abs(alone - expected).max() <= spreads * expected.std())
