"""One group of passages into a collection; those it will not have cost only themselves. Blocks on the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from cache.collection import Collection, StoredPassage
from cache.errors import InvalidPassage, StoreLocked, StoreUnavailable

log = logging.getLogger(__name__)


def put(
    collection: Collection, passages: Sequence[StoredPassage], retry_seconds: Sequence[float] = ()
) -> dict[str, str]:
    """Stores passages (ids are distinct) in one durable write.

    Args:
        retry_seconds: pauses before trying a store again that did not answer.

    Returns:
        Why, by id, for those that were refused; all others are stored.

    Raises:
        CacheError: the store failed.
    """
    refused: dict[str, str] = {}
    pauses = iter(retry_seconds)
    while len(refused) < len(passages):
        try:
            collection.put_many([passage for passage in passages if passage.passage_id not in refused])
            break
        except InvalidPassage as exc:
            refused[exc.passage_id] = exc.reason
        except (StoreUnavailable, StoreLocked) as exc:
            pause = next(pauses, None)
            if pause is None:
                raise
            log.warning("%s; trying again in %g s", exc, pause)
            time.sleep(pause)
    return refused
