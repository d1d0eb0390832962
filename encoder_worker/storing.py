"""One group of passages into a collection; those it will not have cost only themselves. Blocks on the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cache.collection import Collection, StoredPassage
from cache.errors import InvalidPassage, OutOfRange, StoreLocked, StoreUnavailable

log = logging.getLogger(__name__)


@dataclass
class Written:
    """Outcome of a group, by passage id: why it was refused, or how many of its numbers lie outside the codec's
    trained range; 0 of them is left out."""

    refused: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, int] = field(default_factory=dict)
    out_of_range: set[str] = field(default_factory=set)  # of the refused: the codec was not trained for them


def put(
    collection: Collection,
    passages: Sequence[StoredPassage],
    retry_seconds: Sequence[float] = (),
    *,
    allow_clipped: bool = False,
) -> Written:
    """Stores passages (ids are distinct) in one durable write; all but the refused ones are stored.

    Args:
        retry_seconds: pauses before trying a store again that did not answer.
        allow_clipped: store also what the codec was not trained for.

    Raises:
        CacheError: the store failed.
    """
    written = Written()
    pauses = iter(retry_seconds)
    while len(written.refused) < len(passages):
        rest = [passage for passage in passages if passage.passage_id not in written.refused]
        try:
            clipped = collection.put_many(rest, allow_clipped=allow_clipped)
            written.clipped = {one.passage_id: num for one, num in zip(rest, clipped, strict=True) if num}
            break
        except InvalidPassage as exc:
            written.refused[exc.passage_id] = exc.reason
        except OutOfRange as exc:
            written.refused |= exc.reasons
            written.out_of_range |= exc.reasons.keys()
        except (StoreUnavailable, StoreLocked) as exc:
            pause = next(pauses, None)
            if pause is None:
                raise
            log.warning("%s; trying again in %g s", exc, pause)
            time.sleep(pause)
    return written
