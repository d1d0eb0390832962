"""Query, instruction and passage to what a model reads of them, within a profile's limits.

An over-long passage loses tokens at its own end, so that query, instruction and whatever the template puts behind
them always survive. Does not know tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from checkpoint.text import PROBE_CHARACTERS
from decoder_server.cross_encoder.profiles import Profile
from decoder_server.cross_encoder.templates import (
    Encoded,
    Fields,
    Filler,
    PairFiller,
    TemplateFiller,
    Tokenizers,
    list_template,
)

Texts = tuple[str, str | None, str]  # query, instruction or None, passage


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query and a passage as the model reads them."""

    ids: list[int]  # template and special tokens included
    type_ids: list[int] | None  # which of two segments each id belongs to; None: all the first
    query: str  # as read, after its cut
    instruction: str  # as it stands in the template; empty where the profile reads none
    passage: str
    truncated: bool  # the passage lost its end
    query_truncated: bool

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Question:
    """Query and instruction, cut and formatted: the same for every passage of a request."""

    query: str
    instruction: str
    truncated: bool


class PairReader:
    """A tokenizer with a profile. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, profile: Profile) -> None:
        self._profile = profile
        self.tokenizers = Tokenizers(tokenizer)
        self._filler: Filler
        if profile.template:
            pieces = [list_template(profile, 1)] if profile.listwise else profile.template
            self._filler = TemplateFiller(self.tokenizers, pieces, add_special_tokens=profile.add_special_tokens)
        else:
            self._filler = PairFiller(self.tokenizers)
        nothing = {"query": "a", "instruction": "", "passage": ""}
        self._nothing = [self._filler.locate(nothing, guarded=each).encoded.ids for each in (False, True)]

    def is_empty(self, text: str) -> bool:
        """Whether a passage's text is empty: white space alone, or nothing that adds a token to a pair.

        As checkpoint.text says it of passages that are encoded. An unknown token is a token.
        """
        text = self._clean(text).strip()
        for part in dict.fromkeys((text[:PROBE_CHARACTERS], text)):
            row = {"query": "a", "instruction": "", "passage": part}
            if part and self._filler.encode([row])[0].ids not in self._nothing:
                return False
        return True

    def pairs(self, texts: Sequence[Texts]) -> list[TextPair]:
        """Pairs in the order of `texts`.

        Raises:
            ValueError: an instruction over its limit, or a query that leaves no room for a passage.
        """
        asked = {(query, instruction): self.question(query, instruction) for query, instruction, _ in texts}
        questions = [asked[query, instruction] for query, instruction, _ in texts]
        passages = [self._clean(passage) for _, _, passage in texts]
        rows = [
            {"query": q.query, "instruction": q.instruction, "passage": p}
            for q, p in zip(questions, passages, strict=True)
        ]
        return [
            self._pair(question, row, encoded)
            for question, row, encoded in zip(questions, rows, self._filler.encode(rows), strict=True)
        ]

    def question(self, query: str, instruction: str | None) -> Question:
        """A query cut to `max_query_tokens`, and the instruction as the template takes it.

        None is the model's default. An empty one is the template's words with nothing in them, for a model that has
        a default; the others leave the words out, as their authors' code does.

        Raises:
            ValueError: an instruction over its limit: half an instruction may say the opposite of the whole.
        """
        profile = self._profile
        query = self._clean(query)
        cut = self.tokenizers.cut(query, profile.max_query_tokens)
        text = ""
        instruction = profile.default_instruction if instruction is None else instruction
        if (instruction or profile.default_instruction) and profile.takes_instruction:
            found = self.tokenizers.count(instruction)
            if found > profile.max_instruction_tokens:
                raise ValueError(
                    f"instruction has {found} tokens; expected at most {profile.max_instruction_tokens} "
                    f"for {profile.model}"
                )
            text = profile.instruction_format.format(instruction=self._clean(instruction))
        return Question(cut, text, truncated=len(cut) < len(query))

    def _clean(self, text: str) -> str:
        """As the model's authors take a text before it meets the template."""
        for marker in (self._profile.passage_token, self._profile.query_token):
            text = text.replace(marker, "") if marker else text
        return self.tokenizers.calm(text.strip() if self._profile.strip else text)

    def _pair(self, question: Question, row: Fields, encoded: Encoded) -> TextPair:
        passage, truncated = row["passage"], False
        most = self._profile.max_passage_tokens
        if len(encoded.ids) > min(self._profile.max_tokens, most if most is not None else self._profile.max_tokens):
            encoded, passage, truncated = self._shortened(row)
        return TextPair(
            encoded.ids, encoded.type_ids, question.query, question.instruction, passage, truncated, question.truncated
        )

    def _shortened(self, row: Fields) -> tuple[Encoded, str, bool]:
        """The pair without the passage's last tokens, as many as are too many."""
        located = self._filler.locate(row)
        encoded = located.encoded
        own = [i for i, end in enumerate(located.ends) if end is not None]  # indices of the passage's tokens
        room = self._profile.max_tokens - (len(encoded.ids) - len(own))
        if room < 1:
            raise ValueError(
                f"query and instruction leave no room for a passage: with the template they have "
                f"{len(encoded.ids) - len(own)} tokens; {self._profile.model} reads {self._profile.max_tokens}"
            )
        kept = min(room, self._profile.max_passage_tokens or room)
        if len(own) <= kept:
            return encoded, row["passage"], False
        dropped = set(own[kept:])
        ids = [id_ for i, id_ in enumerate(encoded.ids) if i not in dropped]
        types = encoded.type_ids and [type_ for i, type_ in enumerate(encoded.type_ids) if i not in dropped]
        return Encoded(ids, types), row["passage"][: located.ends[own[kept - 1]]], True
