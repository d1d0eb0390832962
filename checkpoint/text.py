"""Text to token ids, with the checkpoint's templates, limits and answer tokens.
A control token spelled in a query or passage (`<end_of_turn>`) is tokenized as plain text, so it cannot open a turn.
Text without such spelling gets exactly the ids of the filled template, tokenized as a whole, as in the reference.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import takewhile
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from checkpoint.files import CheckpointError
from checkpoint.settings import CheckpointSettings

# No two begin alike in any script or spelling that a tokenizer might join with the text before them.
UNLIKE_QUERIES = ("a", "The", "1", "(", "é", "中")
PROBE_CHARACTERS = 64  # looked at first for a token: most texts have one among them
PROBE_FIELDS = {"query": "a", "instruction": ""}  # around it
MAX_PREFIXES = 1024  # instructions whose shared beginning is remembered

Fields = Mapping[str, str]  # query, instruction, passage


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids of one filled template."""

    ids: list[int]
    type_ids: list[int] | None = None  # which of two segments each id belongs to; None: all the first
    # Per id, where the token ends in the passage's text; None where it is not the passage's alone.
    ends: Sequence[int | None] = ()


@dataclass(frozen=True, slots=True)
class TokenizedPassage:
    """A passage, or a window of it, as the encoder reads it."""

    ids: list[int]  # template included
    truncated: bool


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Instruction and query as the decoder reads them; the readout is at the last id."""

    ids: list[int]
    num_query_tokens: int  # of the query alone, after the cut
    query_truncated: bool
    prefix_length: int = 0  # ids at the beginning that every query under this instruction has; 0 where this one differs

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


class Tokenizers:
    """One tokenizer twice: `exact` as published, `plain` with control tokens switched off.
    The switch is state of the object, so one object with a toggle would race between threads. Special tokens shorter
    than `min_control_chars` are no control tokens: texts may spell them.
    """

    def __init__(self, state: str, *, min_control_chars: int = 1) -> None:
        self.exact, self.plain = Tokenizer.from_str(state), Tokenizer.from_str(state)
        for each in (self.exact, self.plain):
            each.no_truncation()
            each.no_padding()
        self.plain.encode_special_tokens = True
        special = {token.content: id_ for id_, token in self.exact.get_added_tokens_decoder().items() if token.special}
        self.control_ids = {text: id_ for text, id_ in special.items() if len(text) >= min_control_chars}
        self.controls = re.compile(_tree(self.control_ids) or r"(?!)")

    def spells_control(self, texts: Iterable[str]) -> bool:
        return any(self.controls.search(text) for text in texts)

    def encode(self, text: str | tuple[str, str], *, plain: bool, add_special_tokens: bool = False) -> Encoding:
        """One text or pair, without holding the interpreter: tokenizers releases it for batches only.
        A megabyte takes a second, in which no other request would be answered.
        """
        tokenizer = self.plain if plain else self.exact
        (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding


class TemplateFiller:
    """A template in pieces, each tokenized separately; ids are joined. Without any, the tokenizer's own pair.
    Where a text spells a control token only the template's own count, and all text between them is read as plain. A
    pair (`[CLS] query [SEP] passage [SEP]` or what its post-processor adds) is always read as plain: its special tokens
    come from the post-processor.
    """

    def __init__(
        self, tokenizers: Tokenizers, pieces: Sequence[str], *, add_special_tokens: bool = False, guard: bool = True
    ) -> None:
        """Without `guard` a control token in a text is one."""
        self._tokenizers, self._pieces, self._guard = tokenizers, pieces, guard
        # ASCII letters and digits that are tokens alone, which no text that begins with one can be without.
        self._readable: set[str] = set()
        self._prefix, self._suffix = [], []  # type: list[int], list[int]
        if add_special_tokens:
            # The tokenizer's own ids around any text: found once, so that neutralised text gets them too.
            bare = tokenizers.exact.encode("a", add_special_tokens=False).ids
            whole = tokenizers.exact.encode("a", add_special_tokens=True).ids
            at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
            self._prefix, self._suffix = whole[:at], whole[at + len(bare) :]

    @cached_property
    def nothing(self) -> list[list[int]]:
        """Ids without a passage, in both ways that texts are tokenized."""
        return [self.locate(PROBE_FIELDS | {"passage": ""}, guarded=guarded).ids for guarded in (False, True)]

    def is_empty(self, text: str) -> bool:
        """Whether a passage's text is empty: white space alone, or nothing that adds a token to the template's.
        A tokenizer may drop a character that it does not know, so characters do not tell; an unknown token is a token.
        Index, worker and server all call this: a text is empty for each of them or for none.
        """
        text = text.strip()
        if (first := text[:1]) in self._readable:
            return False
        parts = (part for part in dict.fromkeys((text[:PROBE_CHARACTERS], text)) if part)
        if all(map(self._adds_nothing, parts)):
            return True
        if first.isascii() and first.isalnum() and not self._adds_nothing(first):
            self._readable.add(first)
        return False

    def _adds_nothing(self, text: str) -> bool:
        return self.encode([PROBE_FIELDS | {"passage": text}])[0].ids in self.nothing

    def encode(self, rows: Sequence[Fields]) -> list[_Encoded]:
        """The filled template per row, without `ends`."""
        if not self._pieces:
            pairs = [(row["query"], row["passage"]) for row in rows]
            whole = self._tokenizers.plain.encode_batch_fast(pairs, add_special_tokens=True)
            return [_Encoded(each.ids, each.type_ids) for each in whole]
        hostile = [self._guard and self._tokenizers.spells_control(row.values()) for row in rows]
        joined = [[*self._prefix] for _ in rows]
        at = [i for i, each in enumerate(hostile) if not each]
        for piece in self._pieces:
            texts = [piece.format(**rows[i]) for i in at]
            found = self._tokenizers.exact.encode_batch_fast(texts, add_special_tokens=False)
            for i, one in zip(at, found, strict=True):
                joined[i].extend(one.ids)
        both = zip(rows, joined, hostile, strict=True)
        return [self.locate(row) if each else _Encoded(ids + self._suffix) for row, ids, each in both]

    def locate(self, row: Fields, *, guarded: bool = False) -> _Encoded:
        """One row with the ends of its passage's tokens; `guarded` as if a text spelled a control token."""
        if not self._pieces:
            found = self._tokenizers.encode((row["query"], row["passage"]), plain=True, add_special_tokens=True)
            located = zip(found.sequence_ids, found.offsets, strict=True)
            return _Encoded(found.ids, found.type_ids, [end if text == 1 else None for text, (_, end) in located])
        guarded = guarded or (self._guard and self._tokenizers.spells_control(row.values()))
        ids, ends = [*self._prefix], [None] * len(self._prefix)  # type: list[int], list[int | None]
        for piece in self._pieces:
            for part in self._parts(piece, guarded):
                if isinstance(part, str):
                    ids.append(self._tokenizers.control_ids[part])
                    ends.append(None)
                    continue
                text, begin, end = "", 0, -1  # the passage in it is [begin, end)
                for literal, name in part:
                    text += literal
                    if name == "passage":
                        begin, end = len(text), len(text) + len(row[name])
                    text += row[name] if name is not None else ""
                found = self._tokenizers.encode(text, plain=guarded)
                ids.extend(found.ids)
                # A token that reaches out of the passage belongs to the template and stays.
                ends.extend(stop - begin if begin <= start and stop <= end else None for start, stop in found.offsets)
        return _Encoded(ids + self._suffix, None, ends + [None] * len(self._suffix))

    def _parts(self, piece: str, guarded: bool) -> list[list[tuple[str, str | None]] | str]:
        """Literal text and the field behind it, to tokenize as one text; guarded ones cut at their control tokens."""
        part: list[tuple[str, str | None]] = []
        parts: list[list[tuple[str, str | None]] | str] = [part]
        for literal, name, _, _ in string.Formatter().parse(piece):
            position = 0
            for match in self._tokenizers.controls.finditer(literal) if guarded else ():
                part.append((literal[position : match.start()], None))
                part, position = [], match.end()
                parts += [match.group(), part]
            part.append((literal[position:], name))
        return parts


class TextTokenizer:
    """A checkpoint's tokenizer together with its templates. Safe to use from several threads."""

    def __init__(self, directory: Path, settings: CheckpointSettings, *, neutralise: bool = True) -> None:
        """Without `neutralise` text that spells a control token becomes it, as in the reference."""
        self._settings, self._neutralise = settings, neutralise
        path = directory / "tokenizer.json"
        try:
            self._both = Tokenizers(path.read_text(encoding="utf-8"))
        except Exception as exc:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path}: cannot be read as a tokenizer ({exc})") from exc
        self.yes_id = single_token(self._both.exact, settings.yes_token, f"{directory}: yes_token")
        self.no_id = single_token(self._both.exact, settings.no_token, f"{directory}: no_token")
        if self.yes_id == self.no_id:
            raise CheckpointError(f"{directory}: yes_token and no_token are the same token {self.yes_id}")
        self._passage = TemplateFiller(self._both, [settings.passage_template], guard=neutralise)
        self._prompt = TemplateFiller(self._both, [settings.prompt_template], guard=neutralise)
        # Tokens that the passage template leaves to a passage.
        self._room = max(1, settings.max_passage_tokens - len(self._passage.nothing[0]))
        self._alone = partial(self._both.encode, plain=neutralise)  # of text from outside, without a template
        self._prefix = lru_cache(MAX_PREFIXES)(self._shared_prefix)
        self.is_empty = self._passage.is_empty

    @cached_property
    def max_id(self) -> int:
        """The largest id that a text can become."""
        # Gemma 3's tokenizer has a control token for images beyond the last row of the embedding; where control tokens
        # in texts are read as plain text, no text becomes it.
        used = set(self._both.controls.findall(self._settings.passage_template + self._settings.prompt_template))
        unreachable = self._both.control_ids.keys() - used if self._neutralise else set()
        return max(id_ for text, id_ in self._both.exact.get_vocab().items() if text not in unreachable)

    def passages(self, texts: Sequence[str]) -> list[TokenizedPassage]:
        """Passages as the encoder reads them, cut right at `max_passage_tokens` (template included)."""
        limit = self._settings.max_passage_tokens
        rows = [each.ids for each in self._passage.encode([{"passage": text} for text in texts])]
        return [TokenizedPassage(ids[:limit], len(ids) > limit) for ids in rows]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Per token of `passages([text])`, before its cut, begin and end in the text; empty for the template's own.
        Without any where the text spells control tokens: its tokens are then not those of one filled template.
        """
        if self._neutralise and self._both.spells_control([text]):
            return []
        template = self._settings.passage_template
        first = len(template[: template.index("{passage}")].format())
        offsets = self._both.encode(template.format(passage=text), plain=False).offsets
        clipped = [(max(0, begin - first), min(len(text), end - first)) for begin, end in offsets]
        return [(begin, end) if begin < end else (0, 0) for begin, end in clipped]

    def passage_windows(self, text: str) -> list[TokenizedPassage]:
        """One passage as windows of at most `max_passage_tokens`, each under the template, without gap or overlap."""
        limit, offsets = self._settings.max_passage_tokens, self._alone(text).offsets
        windows: list[TokenizedPassage] = []
        first, begin, size = 0, 0, self._room  # the window's first token, where its text starts, tokens to try
        while True:
            last = min(first + size, len(offsets))
            end = len(text) if last == len(offsets) else offsets[last][0]
            ids = self._passage.encode([{"passage": text[begin:end]}])[0].ids
            if len(ids) > limit and size > 1:
                # A window alone may need a token more than its share of the whole text: shrink until it fits.
                size = max(1, size - (len(ids) - limit))
                continue
            windows.append(TokenizedPassage(ids[:limit], len(ids) > limit))
            if last == len(offsets):
                return windows
            first, begin, size = last, end, self._room

    def cut(self, text: str, max_tokens: int | None = None, *, keep_end: bool = False) -> str:
        """The beginning of a passage's text, or its end; `max_tokens` None: as much as fits under the template."""
        max_tokens = max_tokens or self._room
        offsets = self._alone(text).offsets
        if len(offsets) <= max_tokens:
            return text
        return text[offsets[-max_tokens][0] :] if keep_end else text[: offsets[max_tokens][0]]

    def prompt(self, query: str, instruction: str | None = None) -> TokenizedPrompt:
        """The decoder's prompt. The query is cut to `max_query_tokens`; the rest is never cut.
        Every query goes through its tokens and back into text, cut or not, as in the official code (KaLM-Reranker's
        build_decoder_text): a character that a tokenizer does not give back, such as U+2581 for a space, is read as the
        text that comes back.
        """
        limit = self._settings.max_query_tokens
        query_ids = self._alone(query).ids
        query = self._both.exact.decode(query_ids[:limit], skip_special_tokens=False)
        instruction = self._settings.default_instruction if instruction is None else instruction
        ids = self._prompt.encode([{"query": query, "instruction": instruction}])[0].ids
        prefix = self._prefix(instruction)
        shared = len(prefix) if len(prefix) < len(ids) and ids[: len(prefix)] == prefix else 0
        return TokenizedPrompt(ids, min(len(query_ids), limit), len(query_ids) > limit, shared)

    def _shared_prefix(self, instruction: str) -> list[int]:
        """The shared beginning of prompts under this instruction, as far as a few unlike queries tell.
        A tokenizer may join the query's first letters with the text before them, so the template's own tokenization
        does not show where the query's begins.
        """
        rows = [{"query": query, "instruction": instruction} for query in UNLIKE_QUERIES]
        columns = zip(*(each.ids for each in self._prompt.encode(rows)), strict=False)
        return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def single_token(tokenizer: Tokenizer, text: str, what: str) -> int:
    """The one id of a text, or a CheckpointError that begins with `what`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise CheckpointError(f"{what} {text!r} is {len(ids)} tokens {ids}; expected exactly one")
    return int(ids[0])


def _tree(words: Iterable[str]) -> str:
    """A pattern of the longest of some words, as a tree of their characters.
    Of a list each word is tried at every place where one may begin: with the 6,000 control tokens of Gemma's tokenizer
    a megabyte of `<` would hold the interpreter for 20 s.
    """
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[:1], []).append(word[1:])
    ends = tails.pop("", None) is not None
    branches = "|".join(re.escape(first) + _tree(rest) for first, rest in tails.items())
    if not branches:
        return ""
    return f"(?:{branches})?" if ends else f"(?:{branches})" if len(tails) > 1 else branches
