"""Reading ahead of the model: items are read, compared with what is stored, and tokenized, a window at a time.

A window is what is sorted by length together, and what bounds memory. Knows no model and no writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cache.states import text_digest
from encoder_worker.passage_encoder import PassageEncoder, Tokenized
from encoder_worker.seen import SeenIds
from encoder_worker.sources import Passage, Reason, Refused, SourceError
from encoder_worker.target import Target

_TOKENIZE_PASSAGES = 256


@dataclass(frozen=True)
class WindowLimits:
    """A window ends at whichever it reaches first."""

    max_passages: int = 4096
    max_text_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class Todo:
    """One passage to encode."""

    passage: Passage
    digest: bytes
    tokenized: Tokenized


@dataclass
class Window:
    """The next passages, ready for the model, and what became of the items between them."""

    num_read: int = 0
    num_unchanged: int = 0
    refused: list[Refused] = field(default_factory=list)
    todo: list[Todo] = field(default_factory=list)
    fraction: float | None = None  # of the source, read up to the window's end
    stopped_by: str | None = None  # why nothing was read after it, where that was not the source's end


def read_windows(
    source: Iterable[Passage | Refused],
    encoder: PassageEncoder,
    target: Target,
    *,
    split: bool = False,
    strict: bool = False,
    force: bool = False,
    limits: WindowLimits | None = None,
) -> Iterator[Window]:
    """Every item of the source, in windows.

    Args:
        split: passages over the token limit become several token windows instead of being cut.
        strict: end at the first refused item.
        force: encode also what is stored with the same text.
    """
    limits = limits or WindowLimits()
    fraction: Callable[[], float | None] = getattr(source, "fraction", lambda: None)
    seen = SeenIds()
    window, fresh, num_bytes = Window(), list[Passage](), 0
    items = iter(source)
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except SourceError as exc:  # what came before is whole, and is kept
            window.stopped_by = str(exc)
            break
        window.num_read += 1
        if isinstance(item, Passage):
            item = _accepted(item, encoder, seen)
        if isinstance(item, Refused):
            window.refused.append(item)
            if strict:
                window.stopped_by = str(item)
                break
        else:
            fresh.append(item)
            num_bytes += len(item.text)
        if window.num_read >= limits.max_passages or num_bytes >= limits.max_text_bytes:
            window.fraction = fraction()
            yield _prepare(window, fresh, encoder, target, split=split, force=force)
            window, fresh, num_bytes = Window(), [], 0
    window.fraction = fraction()
    yield _prepare(window, fresh, encoder, target, split=split, force=force)


def _accepted(passage: Passage, encoder: PassageEncoder, seen: SeenIds) -> Passage | Refused:
    if encoder.is_empty(passage.text):  # before its id counts: a later passage may have it, and a text
        return Refused(passage.place, passage.passage_id, Reason.EMPTY_TEXT, "text is empty")
    return seen.once(passage)


def _prepare(
    window: Window, passages: list[Passage], encoder: PassageEncoder, target: Target, *, split: bool, force: bool
) -> Window:
    digests = [text_digest(passage.text) for passage in passages]
    changed = [True] * len(passages) if force else _changed(passages, digests, target, split=split)
    window.num_unchanged = changed.count(False)
    todo = [pair for pair, is_changed in zip(zip(passages, digests, strict=True), changed, strict=True) if is_changed]
    for start in range(0, len(todo), _TOKENIZE_PASSAGES):
        chunk = todo[start : start + _TOKENIZE_PASSAGES]
        tokenized = encoder.tokenize([passage.text for passage, _ in chunk], split=split)
        for (passage, digest), tokens in zip(chunk, tokenized, strict=True):
            if (failed := tokens.failed) is None:
                window.todo.append(Todo(passage, digest, tokens))
            else:
                window.refused.append(Refused(passage.place, passage.passage_id, Reason(failed.reason), str(failed)))
    return window


def _changed(passages: list[Passage], digests: list[bytes], target: Target, *, split: bool) -> list[bool]:
    ids = [passage.passage_id for passage in passages]
    changed = [stored != digest for stored, digest in zip(target.digests(ids), digests, strict=True)]
    if split:
        # The same text, but stored cut by a run without --split.
        changed = [c or cut for c, cut in zip(changed, target.stored_truncated(ids), strict=True)]
    return changed
