"""States of texts that come with a request: encoded once each, kept while there is room.

Concurrent requests with one text share one encoding. Does not know how encoding works, nor stores.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cache.bounded import ByteBounded
from cache.states import PassageStates
from decoder_server.encoder_client import EncoderError

log = logging.getLogger(__name__)

Key = tuple[bytes, int]  # text digest, ratio the text is encoded at


class Encodes(Protocol):
    """What turns texts into states: an EncoderClient."""

    async def encode(self, texts: Sequence[str], ratio: int) -> list[PassageStates | str]: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there are no states of a text."""

    reason: str


class InlineStates:
    """States of the latest inline texts within a byte budget, with single flight.

    Only touched from the event loop.
    """

    def __init__(self, encoder: Encodes, *, max_bytes: int, base_ratio: int) -> None:
        """
        Args:
            base_ratio: texts wanted at a multiple of it are encoded at it and pooled on, so that one
                encoding serves every such ratio.
        """
        self.num_encoded = 0
        self.num_hits = 0
        self._encoder = encoder
        self._base_ratio = base_ratio
        # The latest rather than the most asked for: who sends a text will soon ask of it again, or never.
        self._kept: ByteBounded[Key, PassageStates] = ByteBounded(max_bytes, lambda states: states.nbytes, policy="lru")
        self._flights: dict[Key, asyncio.Future[PassageStates | Refusal]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._kept.num_bytes

    def kept(self, digest: bytes, ratio: int) -> PassageStates | None:
        """States at `ratio` that need no encoding, if there are any."""
        states = self._kept.get(self._key(digest, ratio))
        if states is None:
            return None
        self.num_hits += 1
        return states.at_ratio(ratio)

    async def encode(self, texts: Mapping[bytes, str], ratio: int) -> dict[bytes, PassageStates | Refusal]:
        """States at `ratio` of texts by digest; what is being encoded already is waited for.

        A caller who leaves does not take the encoding along: others may wait for it, and the next
        request probably will.
        """
        # Looked up again: since the caller looked, another request may have had them encoded.
        kept = {digest: states for digest in texts if (states := self.kept(digest, ratio)) is not None}
        keys = {digest: self._key(digest, ratio) for digest in texts if digest not in kept}
        new = {key: texts[digest] for digest, key in keys.items() if key not in self._flights}
        if new:
            loop = asyncio.get_running_loop()
            self._flights |= {key: loop.create_future() for key in new}
            task = loop.create_task(self._fly(new))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        flights = {digest: self._flights[key] for digest, key in keys.items()}
        if flights:
            await asyncio.wait(flights.values())  # unlike await on each, leaves them be when the caller is cancelled
        return kept | {digest: _at_ratio(flight.result(), ratio) for digest, flight in flights.items()}

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _key(self, digest: bytes, ratio: int) -> Key:
        return digest, self._base_ratio if ratio % self._base_ratio == 0 else ratio

    async def _fly(self, new: dict[Key, str]) -> None:
        (ratio,) = {ratio for _, ratio in new}  # one call of encode, one ratio
        results: list[PassageStates | str] = ["encoding was cut off"] * len(new)
        try:
            results = await self._encoder.encode(list(new.values()), ratio)
            self.num_encoded += len(new)
        except EncoderError as exc:
            results = [str(exc)] * len(new)
        except Exception:  # a bug: the callers must hear that there are no states, the log has why
            log.exception("%d texts could not be encoded", len(new))
            results = ["encoding failed; the server's log has the cause"] * len(new)
        finally:
            for key, result in zip(new, results, strict=True):
                flight = self._flights.pop(key)
                flight.set_result(Refusal(result) if isinstance(result, str) else result)
                if isinstance(result, PassageStates):
                    self._kept.put(key, result)


def _at_ratio(result: PassageStates | Refusal, ratio: int) -> PassageStates | Refusal:
    return result if isinstance(result, Refusal) else result.at_ratio(ratio)
