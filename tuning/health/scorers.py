"""A cross-encoder as the checks see it. Knows decoder_server.models.cross_encoder; does not know what is right.

Both halves of an fbnl checkpoint as the checks see them, and its states by way of a store.

Does not know what is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.collection import StoredPassage
from cache.open import open_store
from cache.states import PassageStates
from checkpoint import Checkpoint
from decoder_server.config import TierBudgets
from decoder_server.models.cross_encoder.backend import CrossEncoder, sigmoid
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.batch_states import StatePair
from encoder_worker.encoder import Encoder
from encoder_worker.passage_encoder import BatchLimits, PassageEncoder
from encoder_worker.writing import CollectionSettings, Target
from tuning import EvaluationError
from tuning.health.checks import Margins
from tuning.health.pairs import TextTriple
from tuning.progress import Advance, ignore
from tuning.rerank import EncodedStates, score_passages

CHUNK_PAIRS = 16  # between two signs of progress; pairs of like length still share passes within it
_FILLER = "the water of the sea rises and falls twice a day "
MAX_FILLED_TOKENS = 8192  # attention over more takes minutes on a CPU


class CrossScorer:
    """A loaded model, as it is served."""

    def __init__(self, model: CrossEncoder) -> None:
        self.model = model
        self.listwise = model.listwise
        self.number_format = model.runtime if "int8" in model.runtime else model.dtype_name

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        if self.listwise:  # lists must stay whole
            return self.model.score_texts([pair.fields() for pair in pairs])
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].passage))
        margins = np.empty(len(pairs), dtype=np.float32)
        for first in range(0, len(order), CHUNK_PAIRS):
            chunk = order[first : first + CHUNK_PAIRS]
            margins[chunk] = self.model.score_texts([pairs[i].fields() for i in chunk])
            advance(len(chunk))
        return margins

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        return self.model.score(self.model.read([pair.fields() for pair in pairs]))

    def scores(self, margins: Margins) -> Margins:
        return self.model.activation(margins)

    def overlong(self) -> str | None:
        limit = self.model.profile.max_passage_tokens or self.model.profile.max_tokens
        return _FILLER * (limit // 2 + 1) if limit <= MAX_FILLED_TOKENS else None


# A word that every tokenizer here spells in at least one token.
# More than the check's pairs need.
KEPT_BYTES = 8 << 30


class FbnlScorer:
    """Both halves at one number format, and the ratio that passages are read at."""

    listwise = False

    def __init__(self, encoder: PassageEncoder, backend: FbnlBackend, ratio: int) -> None:
        self.encoder, self.backend, self.ratio = encoder, backend, ratio
        self.number_format = backend.dtype_name

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, device: str | None = None, dtype: str | None = None, ratio: int | None = None
    ) -> FbnlScorer:
        """Both halves. Raises CheckpointError, ValueError as loading does."""
        backend = FbnlBackend.load(checkpoint, device=device, dtype=dtype)
        return cls.beside(backend, checkpoint, ratio)

    @classmethod
    def beside(cls, backend: FbnlBackend, checkpoint: Checkpoint, ratio: int | None = None) -> FbnlScorer:
        """The encoder that belongs to a loaded decoder, on its device and in its format."""
        half = Encoder.load(checkpoint, device=backend.device_name, dtype=backend.dtype_name)
        encoder = PassageEncoder(checkpoint, half, BatchLimits.for_device(half.device_name))
        return cls(encoder, backend, ratio or checkpoint.settings.default_compression_ratio)

    def states(self, pairs: Sequence[TextTriple], ratio: int | None = None) -> list[PassageStates]:
        """States of each pair's passage, encoded now.

        Raises:
            EvaluationError: a passage that cannot be encoded.
        """
        texts = {str(i): pair.passage for i, pair in enumerate(pairs)}
        found: dict[str, PassageStates] = {}
        for chunk in EncodedStates(self.encoder, texts, ratio or self.ratio).chunks(list(texts)):
            found |= chunk
        missing = [i for i in range(len(pairs)) if str(i) not in found]
        if missing:
            which = "of all passages" if len(missing) == len(pairs) else f"of the passage of pair {missing[0] + 1}"
            raise EvaluationError(f"the encoder's states {which} are not finite: there is nothing to score")
        return [found[str(i)] for i in range(len(pairs))]

    def score(self, pairs: Sequence[TextTriple], states: Sequence[PassageStates], advance: Advance = ignore) -> Margins:
        """Margins of passages already encoded."""
        prompts = [self.backend.prompt(pair.query, pair.instruction) for pair in pairs]
        return score_passages(self.backend, list(zip(prompts, states, strict=True)), advance)

    def kept(
        self, pairs: Sequence[TextTriple], states: Sequence[PassageStates], form: str, advance: Advance = ignore
    ) -> Margins:
        """Margins from a server's tiers, filled before.

        Args:
            states: with keys, as a collection gives them.
            form: how the tiers hold numbers.
        """
        backend = self.backend.keeping(TierBudgets(KEPT_BYTES, KEPT_BYTES, form))
        for pair, passage in zip(pairs, states, strict=True):
            backend.fill(backend.pairs(backend.prompt(pair.query, pair.instruction), [passage])[0])
        return FbnlScorer(self.encoder, backend, self.ratio).score(pairs, states, advance)

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        return self.score(pairs, self.states(pairs), advance)

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        tokenized = self.encoder.tokenize([pair.passage for pair in pairs])
        windows = [one.windows[0] for one in tokenized if one.failed is None]
        states = self.encoder.encode(windows, self.ratio) if len(windows) == len(pairs) else []
        whys = [one.failed for one in tokenized] + [one for one in states if isinstance(one, Exception)]
        failed = next((why for why in whys if why is not None), None)
        if failed is not None:
            raise EvaluationError(f"a passage cannot be encoded: {failed}")
        good = [one for one in states if isinstance(one, np.ndarray)]
        prompts = [self.backend.prompt(pair.query, pair.instruction) for pair in pairs]
        return self.backend.score([StatePair(prompt, one) for prompt, one in zip(prompts, good, strict=True)])

    def scores(self, margins: Margins) -> Margins:
        return sigmoid(margins)

    def overlong(self) -> str | None:
        limit = self.encoder.settings.max_passage_tokens
        return _FILLER * (limit // 2 + 1) if limit <= MAX_FILLED_TOKENS else None


def through_store(
    states: Sequence[PassageStates], encoder: PassageEncoder, ratio: int, codec: str | None
) -> list[PassageStates]:
    """The states as a server reads them: encoded by the codec into a collection, and read back.

    Raises:
        CacheError: an unknown codec, or one that needs more states to train.
    """
    store = open_store("memory:")
    try:
        settings = CollectionSettings(ratio, codec, stores_text=False)
        target = Target(store, "check", settings, encoder.identity, encoder.settings)
        collection = target.create(np.concatenate([one.states for one in states]))
        ids = [str(i) for i in range(len(states))]
        passages = [StoredPassage(id_, one) for id_, one in zip(ids, states, strict=True)]
        collection.put_many(passages, allow_clipped=True)  # how much a codec loses is what is asked here
        read = collection.get_many(ids)
        damaged = next((one for one in read if not isinstance(one, PassageStates)), None)
        if damaged is not None or len(read) != len(states):
            raise EvaluationError(f"a stored passage did not come back: {damaged}")
        return [one for one in read if isinstance(one, PassageStates)]
    finally:
        store.close()
