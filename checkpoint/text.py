"""Text to token ids, with the checkpoint's templates, limits and answer tokens.

Texts from outside are neutralised: where a query or passage spells a control token
(`<end_of_turn>`), it is tokenized as plain text, so it cannot open a turn of its own.
Text without such spelling gets exactly the ids of tokenizing the filled template as a whole,
which is what the reference does. Does not know the model.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from moka_py import Moka
from tokenizers import Encoding, Tokenizer

from checkpoint.files import CheckpointError
from checkpoint.settings import CheckpointSettings

# No two begin alike in any script or spelling a tokenizer might join with what stands before them.
UNLIKE_QUERIES = ("a", "The", "1", "(", "é", "中")
# Characters looked at first for a token: most texts have one among them.
PROBE_CHARACTERS = 64
# Instructions whose beginnings are remembered.
MAX_PREFIXES = 1024


@dataclass(frozen=True, slots=True)
class TokenizedPassage:
    """One passage (or one window of it) as the encoder reads it."""

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


class TextTokenizer:
    """A checkpoint's tokenizer together with its templates. Safe to use from several threads."""

    def __init__(self, directory: Path, settings: CheckpointSettings, *, neutralise: bool = True) -> None:
        """Loads `tokenizer.json`.

        Args:
            neutralise: tokenize control-token text of queries and passages as plain text.
                False is the reference's behaviour: such text becomes the control token.

        Raises:
            CheckpointError: no readable tokenizer, or an answer that is not one token.
        """
        self._settings = settings
        self._neutralise = neutralise
        self._tokenizer = _load(directory / "tokenizer.json")
        # The same tokenizer with control tokens switched off. The switch is state of the
        # tokenizer object, so two objects rather than a toggle that threads would race on.
        self._plain = _load(directory / "tokenizer.json")
        self._plain.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._control_ids = {token.content: id_ for id_, token in added.items() if token.special}
        self._controls = any_of(self._control_ids)
        self.yes_id = self._answer_id(directory, "yes_token", settings.yes_token)
        self.no_id = self._answer_id(directory, "no_token", settings.no_token)
        self._prefixes: Moka[str, list[int]] = Moka(MAX_PREFIXES)
        no_passage = {"passage": ""}
        self._no_passage = [  # ids of the template alone, in both ways that texts are read
            self._encode(settings.passage_template, [no_passage])[0],
            self._encode_guarded(settings.passage_template, no_passage),
        ]
        if self.yes_id == self.no_id:
            raise CheckpointError(f"{directory}: yes_token and no_token are the same token {self.yes_id}")

    @property
    def max_id(self) -> int:
        """The largest id that a text can become.

        Gemma 3's tokenizer has a control token for images beyond the last row of the embedding; where
        control tokens in texts are read as plain text, no text becomes it.
        """
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        templates = self._settings.passage_template + self._settings.prompt_template
        own = set(self._controls.findall(templates))
        unreachable = self._control_ids.keys() - own if self._neutralise else set()
        return max(id_ for text, id_ in vocabulary.items() if text not in unreachable)

    def passages(self, texts: Sequence[str]) -> list[TokenizedPassage]:
        """Passages as the encoder reads them, cut right at `max_passage_tokens` (template included)."""
        limit = self._settings.max_passage_tokens
        rows = self._encode(self._settings.passage_template, [{"passage": text} for text in texts])
        return [TokenizedPassage(ids[:limit], len(ids) > limit) for ids in rows]

    def is_empty(self, text: str) -> bool:
        """Whether a passage's text is empty: white space alone, or nothing that adds a token to the template's.

        A tokenizer may drop what it does not know, so characters do not tell. Index, worker and server all ask
        here: a text is empty for each of them or for none. It must be text that UTF-8 can hold.
        """
        text = text.strip()
        for part in dict.fromkeys((text[:PROBE_CHARACTERS], text)):
            if part and self._encode(self._settings.passage_template, [{"passage": part}])[0] not in self._no_passage:
                return False
        return True

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Per token of `passages([text])`, before its cut, begin and end in the text's characters.

        The template's own tokens have an empty span. Empty where the text spells control tokens,
        because its tokens are then not those of one filled template.
        """
        if self._neutralise and self._controls.search(text):
            return []
        template = self._settings.passage_template
        first = len(template[: template.index("{passage}")].format())
        offsets = encode(self._tokenizer, template.format(passage=text)).offsets
        clipped = [(max(0, begin - first), min(len(text), end - first)) for begin, end in offsets]
        return [(begin, end) if begin < end else (0, 0) for begin, end in clipped]

    def passage_windows(self, text: str) -> list[TokenizedPassage]:
        """One passage cut into windows of at most `max_passage_tokens`, each under the template.

        Windows cover the text without gap or overlap; they break at token borders.
        """
        limit = self._settings.max_passage_tokens
        template_tokens = len(self._encode(self._settings.passage_template, [{"passage": ""}])[0])
        offsets = encode(self._reader, text).offsets
        windows: list[TokenizedPassage] = []
        first = 0  # index of the window's first token; `begin` is where its text starts
        begin = 0
        while True:
            # A window alone may need a token more than its share of the whole text: shrink until it fits.
            size = max(1, limit - template_tokens)
            while True:
                last = min(first + size, len(offsets))
                end = len(text) if last == len(offsets) else offsets[last][0]
                ids = self._encode(self._settings.passage_template, [{"passage": text[begin:end]}])[0]
                if len(ids) <= limit or size == 1:
                    break
                size -= max(1, len(ids) - limit)
                size = max(size, 1)
            windows.append(TokenizedPassage(ids[:limit], len(ids) > limit))
            if last == len(offsets):
                return windows
            first, begin = last, end

    def cut(self, text: str, max_tokens: int | None = None, *, keep_end: bool = False) -> str:
        """The beginning of a passage's text, or with `keep_end` its end, cut at a token border.

        Args:
            max_tokens: at least 1; None: what fits under the passage template.
        """
        if max_tokens is None:
            template_tokens = len(self._encode(self._settings.passage_template, [{"passage": ""}])[0])
            max_tokens = max(1, self._settings.max_passage_tokens - template_tokens)
        offsets = encode(self._reader, text).offsets
        if len(offsets) <= max_tokens:
            return text
        return text[offsets[-max_tokens][0] :] if keep_end else text[: offsets[max_tokens][0]]

    def prompt(self, query: str, instruction: str | None = None) -> TokenizedPrompt:
        """The decoder's prompt. The query is cut to `max_query_tokens`; the rest is never cut.

        Every query goes through its tokens and back into text, cut or not, as in the official code
        (KaLM-Reranker's build_decoder_text): what a tokenizer does not give back, such as U+2581 for a space,
        is read as the text that comes back.
        """
        limit = self._settings.max_query_tokens
        query_ids = encode(self._reader, query).ids
        truncated = len(query_ids) > limit
        query = self._tokenizer.decode(query_ids[:limit], skip_special_tokens=False)
        instruction = self._settings.default_instruction if instruction is None else instruction
        fields = {"query": query, "instruction": instruction}
        ids = self._encode(self._settings.prompt_template, [fields])[0]
        prefix = self._prefix(fields["instruction"])
        shared = len(prefix) if len(prefix) < len(ids) and ids[: len(prefix)] == prefix else 0
        return TokenizedPrompt(ids, min(len(query_ids), limit), truncated, shared)

    def _prefix(self, instruction: str) -> list[int]:
        """Ids that prompts under this instruction begin with, as far as a few unlike queries tell.

        A tokenizer may join the query's first letters with what stands before them, so the template's own
        tokenization does not say where the query's begins.
        """
        prefix: list[int] | None = self._prefixes.get(instruction)
        if prefix is None:
            rows = [{"query": query, "instruction": instruction} for query in UNLIKE_QUERIES]
            columns = zip(*self._encode(self._settings.prompt_template, rows), strict=False)
            prefix = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
            self._prefixes.set(instruction, prefix)
        return prefix

    @property
    def _reader(self) -> Tokenizer:
        """The tokenizer for text that comes from outside and stands alone."""
        return self._plain if self._neutralise else self._tokenizer

    def _encode(self, template: str, rows: list[dict[str, str]]) -> list[list[int]]:
        """Token ids of the filled template, per row of fields."""
        hostile = [
            i
            for i, row in enumerate(rows)
            if self._neutralise and any(self._controls.search(text) for text in row.values())
        ]
        texts = [template.format(**row) for row in rows]
        encoded = [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for i in hostile:
            encoded[i] = self._encode_guarded(template, rows[i])
        return encoded

    def _encode_guarded(self, template: str, fields: dict[str, str]) -> list[int]:
        """Ids where only the template's own control tokens count; text between them is read as plain."""
        ids: list[int] = []
        plain = ""
        for literal, name, _, _ in string.Formatter().parse(template):
            position = 0
            for match in self._controls.finditer(literal):
                plain += literal[position : match.start()]
                ids += encode(self._plain, plain).ids
                ids.append(self._control_ids[match.group()])
                plain, position = "", match.end()
            plain += literal[position:]
            plain += fields[name] if name is not None else ""
        return ids + list(encode(self._plain, plain).ids)

    def _answer_id(self, directory: Path, key: str, text: str) -> int:
        ids = encode(self._tokenizer, text).ids
        if len(ids) != 1:
            raise CheckpointError(f"{directory}: {key} {text!r} is {len(ids)} tokens {ids}; expected exactly one")
        return int(ids[0])


def encode(tokenizer: Tokenizer, text: str | tuple[str, str], *, add_special_tokens: bool = False) -> Encoding:
    """One text or pair, without holding the interpreter: tokenizers releases it for batches only.

    A megabyte takes a second, in which no other request would be answered.
    """
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return encoding


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of some words that begins at a place. A tree of their characters, not a list of them.

    Of a list each is tried at every place where one may begin: with the 6,000 control tokens of Gemma's tokenizer a
    megabyte of `<` would hold the interpreter for 20 s.
    """
    return re.compile(_tree(dict.fromkeys(words)) or r"(?!)")


def _tree(words: Iterable[str]) -> str:
    ends = False
    tails: dict[str, list[str]] = {}
    for word in words:
        if word:
            tails.setdefault(word[0], []).append(word[1:])
        else:
            ends = True
    if not tails:
        return ""
    branches = "|".join(re.escape(first) + _tree(rest) for first, rest in tails.items())
    return f"(?:{branches})?" if ends else f"(?:{branches})" if len(tails) > 1 else branches


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # tokenizers raises bare Exception for a missing and for a broken file alike
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({exc})") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
