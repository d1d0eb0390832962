"""Query, instruction and passage to the token ids a model reads, by its profile's template and limits.
An over-long passage loses tokens at its own end, so query, instruction and whatever the template puts behind them
always survive.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from checkpoint.text import Fields, TemplateFiller, Tokenizers
from decoder_server.models.cross_encoder.profiles import Profile
from preread.errors import InvalidRequest

Texts = tuple[str, str | None, str]  # query, instruction or None, passage


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Query and instruction, cut, formatted and counted once for all passages of a request."""

    query: str  # as read, after its cut
    instruction: str  # as it stands in the template; empty where the profile reads none
    num_query_tokens: int
    num_tokens: int  # of both
    query_truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class TextPair:
    """A prompt and a passage as the model reads them."""

    ids: list[int]  # template and special tokens included
    type_ids: list[int] | None  # which of two segments each id belongs to; None: all the first
    prompt: TextPrompt
    passage: str
    truncated: bool  # the passage lost its end

    num_states, key = 0, b""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    num_prompt_tokens = num_tokens

    @property
    def identity(self) -> bytes:
        return array("q", [len(self.ids), *self.ids]).tobytes() + bytes(self.type_ids or ())


class PairReader:
    """A tokenizer with a profile. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, profile: Profile) -> None:
        self._profile = profile
        # A single character made special (ctxl 2b pads with `+`) opens nothing: it is read as published.
        self.tokenizers = Tokenizers(tokenizer.to_str(), min_control_chars=2)
        # A unigram model may find a control token's spelling in its own vocabulary.
        self._leaky = any(
            id_ in self.tokenizers.plain.encode(f"a {text}", add_special_tokens=False).ids
            for text, id_ in self.tokenizers.control_ids.items()
        )
        pieces = [_list_template(profile, 1)] if profile.listwise else profile.template
        self._filler = TemplateFiller(self.tokenizers, pieces, add_special_tokens=profile.add_special_tokens)

    def count(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self.tokenizers.encode(text, plain=True).ids)

    def cut(self, text: str, max_tokens: int, *, keep_end: bool = False) -> tuple[str, int]:
        """The beginning of a text, or its end, at most `max_tokens` long, and how many tokens it had."""
        offsets = self.tokenizers.encode(text, plain=True).offsets
        if len(offsets) > max_tokens:
            text = text[offsets[-max_tokens][0] :] if keep_end else text[: offsets[max_tokens - 1][1]]
        return text, len(offsets)

    def is_empty(self, text: str) -> bool:
        """As TemplateFiller.is_empty says of the profile's template or the tokenizer's own pair."""
        return self._filler.is_empty(self._clean(text))

    def prompt(self, query: str, instruction: str | None = None) -> TextPrompt:
        """A query cut to `max_query_tokens`, and the instruction as the template takes it.
        None is the model's default. An empty one is the template's words with nothing in them, for a model that has a
        default; the others leave the words out, as their authors' code does. One over its limit is an InvalidRequest:
        half an instruction may say the opposite of the whole.
        """
        profile = self._profile
        query = self._clean(query)
        cut, num_query = self.cut(query, profile.max_query_tokens)
        truncated = len(cut) < len(query)
        num_query = self.count(cut) if truncated else num_query
        text = ""
        instruction = profile.default_instruction if instruction is None else instruction
        if (instruction or profile.default_instruction) and profile.takes_instruction:
            found = self.count(instruction)
            if found > profile.max_instruction_tokens:
                limit = f"at most {profile.max_instruction_tokens}"
                told = f"too long (instruction has {found} tokens; expected {limit} for {profile.model})"
                raise InvalidRequest("instruction", told, f"{limit} tokens")
            text = profile.instruction_format.format(instruction=self._clean(instruction))
        return TextPrompt(cut, text, num_query, num_query + self.count(text), truncated)

    def read(self, texts: Sequence[Texts]) -> list[TextPair]:
        """As `pairs`, of any queries and instructions; each is read once."""
        prompts = {(query, instruction): self.prompt(query, instruction) for query, instruction, _ in texts}
        return self.pairs([(prompts[query, instruction], passage) for query, instruction, passage in texts])

    def list_ids(self, pairs: Sequence[TextPair]) -> list[int]:
        """One sequence with the passages of all pairs, of one prompt, for a listwise model."""
        filler = TemplateFiller(self.tokenizers, [_list_template(self._profile, len(pairs))])
        passages = {f"passage{i or ''}": pair.passage for i, pair in enumerate(pairs)}
        prompt = pairs[0].prompt
        return filler.encode([{"query": prompt.query, "instruction": prompt.instruction, **passages}])[0].ids

    def pairs(self, texts: Sequence[tuple[TextPrompt, str]]) -> list[TextPair]:
        """Prompts with a passage each; ValueError where query and instruction leave no room for one."""
        rows = [{"query": p.query, "instruction": p.instruction, "passage": self._clean(text)} for p, text in texts]
        limit = min(self._profile.max_tokens, self._profile.max_passage_tokens or self._profile.max_tokens)
        return [
            TextPair(whole.ids, whole.type_ids, prompt, row["passage"], truncated=False)
            if len(whole.ids) <= limit
            else self._cut_pair(prompt, row)
            for (prompt, _), row, whole in zip(texts, rows, self._filler.encode(rows), strict=True)
        ]

    def _cut_pair(self, prompt: TextPrompt, row: Fields) -> TextPair:
        """The pair without the passage's last tokens, as many as are too many."""
        profile, passage, encoded = self._profile, row["passage"], self._filler.locate(row)
        own = [i for i, end in enumerate(encoded.ends) if end is not None]  # indices of the passage's tokens
        around = len(encoded.ids) - len(own)
        room = profile.max_tokens - around
        if room < 1:
            raise ValueError(
                f"query and instruction leave no room for a passage: with the template they have {around} tokens; "
                f"{profile.model} reads {profile.max_tokens}"
            )
        kept = min(room, profile.max_passage_tokens or room)
        dropped = set(own[kept:])
        if dropped:
            passage = passage[: encoded.ends[own[kept - 1]]]
        ids = [id_ for i, id_ in enumerate(encoded.ids) if i not in dropped]
        types = encoded.type_ids and [type_ for i, type_ in enumerate(encoded.type_ids) if i not in dropped]
        return TextPair(ids, types, prompt, passage, truncated=bool(dropped))

    def _clean(self, text: str) -> str:
        """As the model's authors take a text before it meets the template."""
        for marker in (self._profile.passage_token, self._profile.query_token):
            text = text.replace(marker, "") if marker else text
        text = text.strip() if self._profile.strip else text
        # Where the plain tokenizer would read a control token all the same, its spelling is broken.
        return self.tokenizers.controls.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) if self._leaky else text


def _list_template(profile: Profile, num_passages: int) -> str:
    """A listwise template with a place for each passage: {passage} for the first, {passage1} and so on."""
    places = [
        profile.passage_format.replace("{index}", str(i)).replace("{passage}", f"{{passage{i or ''}}}")
        for i in range(num_passages)
    ]
    return profile.template[0].replace("{count}", str(num_passages)).replace("{passages}", "\n".join(places))
