"""Fills a template, or a tokenizer's own pair, and says which token ids are the passage's.

Control tokens spelled in texts from outside are tokenized as plain text; text without such spelling gets exactly
the ids of the filled template. Does not know limits or tensors.

Query, instruction and passage to what a model reads of them, within a profile's limits.

An over-long passage loses tokens at its own end, so that query, instruction and whatever the template puts behind
them always survive. Does not know tensors.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Encoding, Tokenizer

from checkpoint.text import PROBE_CHARACTERS, any_of, encode
from decoder_server.models.cross_encoder.profiles import Profile

Fields = Mapping[str, str]  # query, instruction, passage


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one pair."""

    ids: list[int]
    type_ids: list[int] | None = None  # which of two segments each id belongs to; None: all the first


@dataclass(frozen=True, slots=True)
class Located:
    """The same with, per id, where the token ends in the passage's text; None where it is not the passage's alone."""

    encoded: Encoded
    ends: list[int | None]


class Filler(Protocol):
    """Makes one sequence of a query, an instruction and a passage."""

    def encode(self, rows: Sequence[Fields]) -> list[Encoded]: ...

    def locate(self, row: Fields, *, guarded: bool = False) -> Located:
        """
        Args:
            guarded: tokenize as if a text spelled a control token.
        """
        ...


class Tokenizers:
    """A tokenizer twice: as it is, and with control tokens switched off (one object with a switch would race)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        state = tokenizer.to_str()
        self.exact, self.plain = Tokenizer.from_str(state), Tokenizer.from_str(state)
        for each in (self.exact, self.plain):
            each.no_truncation()
            each.no_padding()
        self.plain.encode_special_tokens = True
        added = self.exact.get_added_tokens_decoder()
        # A single character made special (ctxl 2b pads with `+`) opens nothing: it is read as published.
        self.control_ids = {t.content: id_ for id_, t in added.items() if t.special and len(t.content) > 1}
        self.controls = any_of(self.control_ids)
        # A unigram model may find a control token's spelling in its own vocabulary.
        self._leaky = any(
            id_ in self.plain.encode(f"a {text}", add_special_tokens=False).ids
            for text, id_ in self.control_ids.items()
        )

    def calm(self, text: str) -> str:
        """A text that `plain` reads without control tokens: where it otherwise would not, their spelling is broken."""
        return self.controls.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) if self._leaky else text

    def cut(self, text: str, max_tokens: int, *, keep_end: bool = False) -> str:
        """The beginning of a text, or its end, at most `max_tokens` long."""
        offsets = encode(self.plain, text).offsets
        if len(offsets) <= max_tokens:
            return text
        return text[offsets[-max_tokens][0] :] if keep_end else text[: offsets[max_tokens - 1][1]]

    def count(self, text: str) -> int:
        return len(encode(self.plain, text).ids)


class PairFiller:
    """The tokenizer's own pair: `[CLS] query [SEP] passage [SEP]` or what its post-processor says."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        # Special tokens come from the post-processor, so the plain tokenizer reads every text rightly.
        self._plain = tokenizers.plain

    def encode(self, rows: Sequence[Fields]) -> list[Encoded]:
        pairs = [(row["query"], row["passage"]) for row in rows]
        return [Encoded(e.ids, e.type_ids) for e in self._plain.encode_batch_fast(pairs, add_special_tokens=True)]

    def locate(self, row: Fields, *, guarded: bool = False) -> Located:
        found = encode(self._plain, (row["query"], row["passage"]), add_special_tokens=True)
        ends = [
            end if sequence == 1 else None for sequence, (_, end) in zip(found.sequence_ids, found.offsets, strict=True)
        ]
        return Located(Encoded(found.ids, found.type_ids), ends)


class TemplateFiller:
    """A template in pieces, each tokenized by itself; ids are joined."""

    def __init__(self, tokenizers: Tokenizers, pieces: Sequence[str], *, add_special_tokens: bool) -> None:
        self._tokenizers = tokenizers
        self._pieces = list(pieces)
        self._prefix: list[int] = []
        self._suffix: list[int] = []
        if add_special_tokens:
            # What the tokenizer puts around any text: found once, so that neutralised text gets it too.
            bare = tokenizers.exact.encode("a", add_special_tokens=False).ids
            whole = tokenizers.exact.encode("a", add_special_tokens=True).ids
            at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
            self._prefix, self._suffix = whole[:at], whole[at + len(bare) :]

    @property
    def suffix(self) -> list[int]:
        """Ids that the tokenizer puts behind the filled template."""
        return self._suffix

    def encode(self, rows: Sequence[Fields]) -> list[Encoded]:
        hostile = {i for i, row in enumerate(rows) if self._hostile(row)}
        kind = [row for i, row in enumerate(rows) if i not in hostile]
        joined = [list(self._prefix) for _ in kind]
        for piece in self._pieces:
            texts = [piece.format(**row) for row in kind]
            for ids, e in zip(
                joined, self._tokenizers.exact.encode_batch_fast(texts, add_special_tokens=False), strict=True
            ):
                ids.extend(e.ids)
        quick = iter(joined)
        return [
            self.locate(row).encoded if i in hostile else Encoded(next(quick) + self._suffix)
            for i, row in enumerate(rows)
        ]

    def locate(self, row: Fields, *, guarded: bool = False) -> Located:
        guarded = guarded or self._hostile(row)
        ids, ends = list(self._prefix), [None] * len(self._prefix)  # type: list[int], list[int | None]
        for piece in self._pieces:
            (self._guarded if guarded else self._exact)(piece, row, ids, ends)
        return Located(Encoded(ids + self._suffix), ends + [None] * len(self._suffix))

    def _hostile(self, row: Fields) -> bool:
        """Whether a text spells a control token."""
        return any(self._tokenizers.controls.search(text) for text in row.values())

    def _exact(self, piece: str, row: Fields, ids: list[int], ends: list[int | None]) -> None:
        """Appends one piece, tokenized as a whole."""
        text, begin, end = "", 0, -1
        for literal, name, _, _ in string.Formatter().parse(piece):
            text += literal
            if name == "passage":
                begin, end = len(text), len(text) + len(row[name])
            text += row[name] if name is not None else ""
        self._append(encode(self._tokenizers.exact, text), begin, end, ids, ends)

    def _guarded(self, piece: str, row: Fields, ids: list[int], ends: list[int | None]) -> None:
        """Appends one piece: the template's own control tokens count, all text between them is read as plain."""
        text, begin, end = "", 0, -1  # text not yet tokenized; the passage in it is [begin, end)
        for literal, name, _, _ in string.Formatter().parse(piece):
            position = 0
            for match in self._tokenizers.controls.finditer(literal):
                self._flush(text + literal[position : match.start()], begin, end, ids, ends)
                ids.append(self._tokenizers.control_ids[match.group()])
                ends.append(None)
                text, begin, end, position = "", 0, -1, match.end()
            text += literal[position:]
            if name == "passage":
                begin, end = len(text), len(text) + len(row[name])
            text += row[name] if name is not None else ""
        self._flush(text, begin, end, ids, ends)

    def _flush(self, text: str, begin: int, end: int, ids: list[int], ends: list[int | None]) -> None:
        self._append(encode(self._tokenizers.plain, text), begin, end, ids, ends)

    def _append(self, found: Encoding, begin: int, end: int, ids: list[int], ends: list[int | None]) -> None:
        ids.extend(found.ids)
        # A token that reaches out of the passage belongs to the template and stays.
        ends.extend(stop - begin if begin <= start and stop <= end else None for start, stop in found.offsets)


def list_template(profile: Profile, num_passages: int) -> str:
    """The profile's template with a place for each passage: {passage} for the first, {passage1} and so on."""
    places = [
        profile.passage_format.replace("{index}", str(i)).replace("{passage}", "{" + place(i) + "}")
        for i in range(num_passages)
    ]
    return profile.template[0].replace("{count}", str(num_passages)).replace("{passages}", "\n".join(places))


def place(index: int) -> str:
    """The field of a list's passage."""
    return f"passage{index or ''}"


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
