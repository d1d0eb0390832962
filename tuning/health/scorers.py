"""The pairs that scores are compared on, and models as the checks see them: texts in, margins out.

The built-in hundred: twenty questions with five passages each, from the answer to nonsense; eight in English, eight in
Korean, four that mix both; nine of them have an instruction.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.collection import StoredPassage
from cache.open import open_store
from cache.states import PassageStates
from checkpoint import TokenizedPrompt
from decoder_server.config import NO_KV_CACHES, KvCacheConfig
from decoder_server.models.backend import sigmoid
from decoder_server.models.cross_encoder.backend import CrossEncoder
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from encoder_worker.config import CollectionSettings
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.writing import Target
from tuning import EvaluationError
from tuning.progress import Advance, ignore
from tuning.rerank import EncodedStates, score_passages
from tuning.trec import JudgedFile

Margins = NDArray[np.float32]  # (num_pairs,)
MIN_PAIRS = 2  # fewer have no order to compare
_BUILT_IN = Path(__file__).parent / "pairs.jsonl"
T = TypeVar("T")
_PASSAGE_FIELDS = ("passage", "text", "document")
_CHUNK_PAIRS = 16  # between two signs of progress; pairs of like length still share batches within it
_CACHE_BYTES = 8 << 30  # more than the check's pairs need


class TextTriple(NamedTuple):
    """A query, its instruction if any, and one passage: the order in which cross-encoders take them."""

    query: str
    instruction: str | None
    passage: str


@dataclass(frozen=True)
class PairSet:
    """Pairs and where they came from."""

    name: str
    pairs: Sequence[TextTriple]

    @classmethod
    def read(cls, path: Path | None = None) -> "PairSet":
        """JSON lines of query, passage (text, document), maybe instruction; None: built-in. EvaluationError: a line."""
        pairs = []
        for where, row in JudgedFile(path or _BUILT_IN).rows():
            passage = next((name for name in _PASSAGE_FIELDS if name in row), None)
            if "query" not in row or passage is None:
                raise EvaluationError(f"{where}: fields {', '.join(row) or 'none'}; expected query and passage")
            for name in ("query", passage, "instruction"):
                value = row.get(name)
                default = name == "instruction" and value in (None, "")  # the model's
                if not default and (not isinstance(value, str) or not value.strip()):
                    raise EvaluationError(f"{where}: {name} is {value!r}; expected a text")
            pairs.append(TextTriple(row["query"], row.get("instruction"), row[passage]))
        if len(pairs) < MIN_PAIRS:
            raise EvaluationError(f"{path}: {len(pairs)} pairs; expected at least {MIN_PAIRS}")
        return cls(str(path) if path is not None else "built-in pairs", pairs)

    def __len__(self) -> int:
        return len(self.pairs)


class Scorer(ABC):
    """One way of serving one model."""

    listwise = False  # a score depends on the other pairs that are scored with it

    def __init__(self, name: str, number_format: str, max_passage_tokens: int) -> None:
        self.name = name
        self.number_format = number_format  # float32, bfloat16, or a runtime's name with int8 in it
        self.max_passage_tokens = max_passage_tokens

    @abstractmethod
    def margins(self, pairs: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        """Margins (len(pairs),) as a server computes them: pairs of like length share a batch."""

    @abstractmethod
    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        """Margins (len(pairs),) of one padded batch."""

    @abstractmethod
    def scores(self, margins: Margins) -> Margins:
        """As published."""

    def one_by_one(self, pairs: Sequence[TextTriple]) -> Margins:
        """Margins (len(pairs),), each of a separate pass: nothing is padded."""
        return np.concatenate([self.together([pair]) for pair in pairs])


class CrossScorer(Scorer):
    """A loaded cross-encoder, as it is served."""

    def __init__(self, model: CrossEncoder) -> None:
        number_format = model.runtime if "int8" in model.runtime else model.dtype_name
        super().__init__(model.checkpoint_name, number_format, model.settings.max_passage_tokens)
        self.model = model
        self.listwise = model.listwise

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        if self.listwise:  # lists must stay whole
            return self.model.score_texts(pairs)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].passage))
        margins = np.empty(len(pairs), dtype=np.float32)
        for first in range(0, len(order), _CHUNK_PAIRS):
            chunk = order[first : first + _CHUNK_PAIRS]
            margins[chunk] = self.model.score_texts([pairs[i] for i in chunk])
            advance(len(chunk))
        return margins

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        return self.model.score(self.model.read(pairs))

    def scores(self, margins: Margins) -> Margins:
        return self.model.activation(margins)


class FbnlScorer(Scorer):
    """Both halves of an fbnl checkpoint, on the decoder's device and in its format, uncached, read at one ratio."""

    def __init__(self, backend: FbnlBackend, ratio: int | None = None) -> None:
        super().__init__(backend.checkpoint_name, backend.dtype_name, backend.settings.max_passage_tokens)
        self.checkpoint = backend.checkpoint
        self.backend = backend.with_caches(NO_KV_CACHES)
        self.encoder = PassageEncoder.load(self.checkpoint, device=backend.device_name, dtype=backend.dtype_name)
        self.ratio = ratio or self.checkpoint.settings.default_compression_ratio

    def in_format(self, dtype: str) -> "FbnlScorer":
        return FbnlScorer(FbnlBackend(self.checkpoint, device=self.backend.device_name, dtype=dtype), self.ratio)

    def states(self, pairs: Sequence[TextTriple], ratio: int | None = None) -> list[PassageStates]:
        """States of each pair's passage, encoded now. Raises EvaluationError: a passage that cannot be encoded."""
        texts = {str(number): pair.passage for number, pair in enumerate(pairs, 1)}
        found: dict[str, PassageStates] = {}
        for chunk in EncodedStates(self.encoder, texts, ratio or self.ratio).chunks(list(texts)):
            found |= chunk
        if missing := [number for number in texts if number not in found]:
            which = "of all passages" if not found else f"of the passage of pair {missing[0]}"
            raise EvaluationError(f"the encoder's states {which} are not finite: there is nothing to score")
        return [found[number] for number in texts]

    def stored(self, states: Sequence[PassageStates], codec: str) -> list[PassageStates]:
        """The states as a server reads them, out of a collection in `codec`. Raises CacheError where it cannot be."""
        with closing(open_store("memory:")) as store:
            settings = CollectionSettings(self.ratio, codec, stores_text=False)
            collection = Target(store, "check", settings, self.encoder).create(states)
            passages = [StoredPassage(str(i), one) for i, one in enumerate(states)]
            collection.put_many(passages, allow_clipped=True)  # the codec's loss is the point of it
            read = collection.get_many([one.passage_id for one in passages])
        if damaged := [one for one in read if not isinstance(one, PassageStates)]:
            raise EvaluationError(f"a stored passage did not come back: {damaged[0]}")
        return [one for one in read if isinstance(one, PassageStates)]

    def score(self, pairs: Sequence[TextTriple], states: Sequence[PassageStates], advance: Advance = ignore) -> Margins:
        return score_passages(self.backend, self._prompted(pairs, states), advance)

    def cached(
        self, pairs: Sequence[TextTriple], states: Sequence[PassageStates], form: str, advance: Advance = ignore
    ) -> Margins:
        """Margins from a server's caches in number format `form`, filled before; states as a collection gives them."""
        backend = self.backend.with_caches(KvCacheConfig(_CACHE_BYTES, _CACHE_BYTES, form))
        passages = self._prompted(pairs, states)
        for prompt, passage in passages:
            backend.fill(backend.pairs(prompt, [passage])[0])
        return score_passages(backend, passages, advance)

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        return self.score(pairs, self.states(pairs), advance)

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        tokenized = self.encoder.tokenize([pair.passage for pair in pairs])
        failed: list[object] = [one.failed for one in tokenized if one.failed]
        encoded = self.encoder.encode([one.windows[0] for one in tokenized], self.ratio) if not failed else []
        states = [one for one in encoded if isinstance(one, np.ndarray)]
        failed += [one for one in encoded if not isinstance(one, np.ndarray)]
        if failed:
            raise EvaluationError(f"a passage cannot be encoded: {failed[0]}")
        return self.backend.score([StatePair(*pair) for pair in self._prompted(pairs, states)])

    def scores(self, margins: Margins) -> Margins:
        return sigmoid(margins)

    def _prompted(self, pairs: Sequence[TextTriple], states: Sequence[T]) -> list[tuple[TokenizedPrompt, T]]:
        prompt = self.backend.prompt
        return [(prompt(pair.query, pair.instruction), own) for pair, own in zip(pairs, states, strict=True)]
