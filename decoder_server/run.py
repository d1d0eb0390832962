"""One admitted request under way: states in, pairs to the queue, margins back, outcomes out.

Everything here happens on the event loop. Does not know edges, limits or other requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from decoder_server.admission import Admission, Place
from decoder_server.backend import Backend, Item, Prompt
from decoder_server.batcher import Batcher
from decoder_server.errors import InvalidRequest, Refused
from decoder_server.observer import Turn
from decoder_server.passages import Found, Source, Wanted
from decoder_server.request import OnMiss, Outcome, Status
from decoder_server.tally import Tally, unscored
from decoder_server.ticket import Scored, Ticket, Work

Emit = Callable[[list[Outcome]], Awaitable[None]]


class Run:
    """Made for one request inside its ticket."""

    def __init__(
        self,
        wanted: Wanted,
        same: Mapping[int, Sequence[int]],
        prompt: Prompt,
        backend: Backend,
        batcher: Batcher,
        source: Source,
        admission: Admission,
        max_tokens: int | None = None,
    ) -> None:
        """
        Args:
            same: per index of a wanted candidate, every index of the request that names the same passage.
            max_tokens: of the request, prompt tokens and states over all its pairs; None: no limit.
        """
        self._wanted = wanted
        self._num_prompt_tokens = prompt.num_tokens
        self._batcher = batcher
        self._source = source
        self._admission = admission
        self._tally = Tally(backend.activate, prompt.num_tokens)
        self._same = same
        self._finished: asyncio.Queue[list[Outcome] | BaseException] = asyncio.Queue()
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self.turns: list[Turn] = []
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0

    async def gather(self, place: Place, deadline: float | None, emit: Emit | None) -> list[Outcome]:
        """Every candidate's outcome, unsorted.

        When the caller is cancelled, reading stops and what waits is dropped before the next pass.

        Raises:
            Refused: on_miss is fail and a candidate is missing.
            InvalidRequest: the request has more tokens than one may.
        """
        outcomes: list[Outcome] = []
        left = len(self._wanted.candidates)
        with self._batcher.ticket(place.num_tokens, self._scored, deadline) as ticket:
            feeder = asyncio.create_task(self._feed(ticket))
            try:
                while left:
                    fresh = await self._finished.get()
                    if isinstance(fresh, BaseException):
                        raise fresh
                    left -= len(fresh)
                    place.finished(len(fresh))
                    named = [replace(outcome, index=i) for outcome in fresh for i in self._same[outcome.index]]
                    outcomes += named
                    if emit is not None and named:
                        await emit(named)
            finally:
                feeder.cancel()
                self.queue_seconds, self.compute_seconds = ticket.queue_seconds, ticket.compute_seconds
                self.turns = ticket.turns
        return outcomes

    async def _feed(self, ticket: Ticket) -> None:
        try:
            await self._source.feed(
                self._wanted,
                room=lambda: ticket.room(self._batcher.share_tokens()),
                deliver=lambda found: self._arrived(ticket, found),
            )
        except Exception as exc:  # a bug, or it would be a Found: the request must hear of it
            self._finished.put_nowait(exc)

    def _arrived(self, ticket: Ticket, found: list[Found]) -> None:
        works: list[Work] = []
        outcomes: list[Outcome] = []
        for one in found:
            if one.passage is not None:
                items = one.items or self._wanted.items(one.passage)
                self._tally.expect(one, items)
                works += [Work(ticket, one.candidate.index, item) for item in items]
                self._admission.learn(self._num_passage_tokens(one, items))
            elif one.status is Status.MISSING and self._wanted.on_miss is OnMiss.FAIL:
                self._finished.put_nowait(_missing(one))
            else:
                outcomes.append(unscored(one))
        self._num_tokens += sum(work.num_tokens for work in works)
        if self._max_tokens is not None and self._num_tokens > self._max_tokens:
            expected = f"at most {self._max_tokens}, prompt tokens and states over all candidates"
            self._finished.put_nowait(InvalidRequest("tokens of the request", self._num_tokens, expected))
            return
        self._batcher.submit(ticket, works)
        self._finished.put_nowait(outcomes)

    def _num_passage_tokens(self, found: Found, items: Sequence[Item]) -> int:
        if found.states is not None:
            return found.states.num_tokens
        return sum(max(1, item.num_tokens - self._num_prompt_tokens) for item in items)

    def _scored(self, scored: list[Scored]) -> None:
        self._finished.put_nowait(self._tally.add(scored))


def _missing(found: Found) -> Refused:
    candidate = found.candidate
    name = repr(candidate.passage_id) if candidate.passage_id is not None else "an inline text"
    return Refused(
        "PASSAGE_MISSING",
        candidate.passage_id or f"candidates[{candidate.index}]",
        f"candidates[{candidate.index}] ({name}): {found.message}, and on_miss is fail",
    )
