"""Real states and the margins they give, for `benchmarks.codecs`: encoded once, scored once, kept in a work folder.

Queries are drawn by seed, their candidates are BM25's best; other passages of the collection train the codecs, as many
states as `preread index` would take where there are that many. States are stored once at r = 1 in float32 by indexing
into an embedded store; an interrupted run goes on where it was. Does not know measures or tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.collection import Collection
from cache.open import open_store
from cache.states import PassageStates
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from encoder_worker.config import CollectionSettings
from encoder_worker.indexing import index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.sources import Place, SourcePassage
from tuning.baselines import search
from tuning.judged import read_judged
from tuning.progress import StageProgress
from tuning.rerank import score_passages

Margins = NDArray[np.float32]  # (num_queries, num_candidates)
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]
ROTATIONS = ("RR", "OPQ", "PCA", "ITQ")


class Rotated:
    """A FAISS standalone codec behind a rotation, by factory string: measured here, not offered for collections."""

    needs_training = True

    def __init__(self, factory: str, dim: int) -> None:
        index: Any = faiss.index_factory(dim, factory)  # the stubs know only the base class
        self._index = index
        self.num_centroids = 256 if factory.rpartition(",")[2].startswith("PQ") else 0
        if self.num_centroids:
            base: Any = faiss.downcast_index(index.index)
            base.pq.cp.min_points_per_centroid = 1
            base.do_polysemous_training = False

    @property
    def code_size_bytes(self) -> int:
        return int(self._index.sa_code_size())

    def train(self, sample: NDArray[np.float32]) -> None:
        self._index.train(np.ascontiguousarray(sample))

    def encode(self, states: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.asarray(self._index.sa_encode(states))

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(self._index.sa_decode(codes))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    queries: int
    candidates: int
    training_passages: int
    residual_training_states: int | None = None
    seed: int = 0


class Workload:
    """One checkpoint over one collection."""

    def __init__(self, checkpoint: str, folder: Path, sizes: Sizes, work: Path, progress: StageProgress) -> None:
        """
        Args:
            folder: BEIR layout.
            work: where states and margins are kept; each checkpoint and size has separate files.
        """
        self.opened = Checkpoint.open(checkpoint)
        self.sizes = sizes
        self._progress = progress
        judged = read_judged(folder)
        # BM25 over everything first: only queries with enough candidates can be compared by their top 10.
        sampled = judged.sample(4 * sizes.queries, sizes.seed)
        found = search(judged.passages, sampled.queries, sizes.candidates, progress)
        full = [q for q, ranking in found.items() if len(ranking) == sizes.candidates][: sizes.queries]
        if len(full) < sizes.queries:
            raise SystemExit(f"{folder}: {len(full)} queries with {sizes.candidates} candidates, {sizes.queries} asked")
        self.candidates = {q: [passage_id for passage_id, _ in found[q]] for q in full}
        self.queries = {q: judged.queries[q] for q in full}
        self.qrels = {q: judged.qrels[q] for q in full}
        self.scored = list(dict.fromkeys(p for ids in self.candidates.values() for p in ids))
        others = [p for p in judged.passages if p not in set(self.scored)]
        np.random.default_rng(sizes.seed).shuffle(others)
        self.training = others[: sizes.training_passages]
        texts = {p: judged.passages[p] for p in [*self.scored, *self.training] if judged.passages[p].strip()}
        self.name = f"{Path(checkpoint).name}-{folder.name}"
        # States serve every size; margins are of one.
        self.weights = self.opened.identity.fingerprint[:8]
        root = work / f"{self.name}-{self.weights}"
        self._folder = root / f"{sizes.queries}x{sizes.candidates}-{sizes.training_passages}-{sizes.seed}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store = open_store(f"faiss:{root}/store")
        self._states = self._index(texts)
        self._backends: dict[str, FbnlBackend] = {}
        self._samples: dict[tuple[int, int], NDArray[np.float32]] = {}

    @property
    def dim(self) -> int:
        return self.opened.dim

    def _index(self, texts: dict[str, str]) -> Collection:
        stored = self._store.headers_many("states", list(texts))
        items = [
            SourcePassage(p, text, Place("collection", line))
            for line, ((p, text), there) in enumerate(zip(texts.items(), stored, strict=True))
            if there is None
        ]
        if items:
            encoder = PassageEncoder.load(str(self.opened.path), dtype="float32")
            settings = CollectionSettings(compression_ratio=1, codec="Flat", stores_text=False)
            advance = self._progress.begin("encode", len(items), "passages")
            for first in range(0, len(items), 32):  # small groups: little is lost by an interruption
                index(items[first : first + 32], encoder, self._store, "states", settings)
                advance(len(items[first : first + 32]))
        return Collection.open(self._store, "states", fingerprint=self.opened.identity.fingerprint)

    def states(self, passage_ids: list[str], ratio: int) -> Iterator[tuple[str, PassageStates]]:
        """Float32 states at a ratio, as the encoder gave them."""
        for first in range(0, len(passage_ids), 64):
            chunk = passage_ids[first : first + 64]
            for passage_id, found in zip(chunk, self._states.get_many(chunk), strict=True):
                if isinstance(found, PassageStates):
                    yield passage_id, found.at_ratio(ratio)

    def sample(self, ratio: int, num_states: int) -> NDArray[np.float32]:
        """States to train a codec on, (at most num_states, dim), of passages that are not scored."""
        key = (ratio, num_states)
        if key not in self._samples:
            parts, length = [], 0
            for _, states in self.states(self.training, ratio):
                parts.append(states.states)
                length += states.num_states
                if length >= num_states:
                    break
            self._samples[key] = np.concatenate(parts)[:num_states]
        return self._samples[key]

    def coded(self, name: str, ratio: int) -> tuple[Margins, int, int]:
        """Margins where states went through a codec and back, bytes of a state, and states it was trained on."""
        codec = Rotated(name, self.dim) if name.startswith(ROTATIONS) else Codec(name, self.dim)
        num_states = max(8192, 64 * codec.num_centroids) if codec.needs_training else 0
        key = name
        if name.startswith("RQ") and self.sizes.residual_training_states:
            num_states = min(num_states, self.sizes.residual_training_states)
            key = f"{name}~{num_states}"
        sample = self.sample(ratio, num_states) if num_states else np.empty((0, self.dim), np.float32)
        trained = False

        def change(states: NDArray[np.float32]) -> NDArray[np.float32]:
            nonlocal trained
            if not trained:  # not before: margins may have been kept
                codec.train(sample)
                trained = True
            return codec.decode(codec.encode(states))

        return self.margins(key, ratio, change), codec.code_size_bytes, len(sample)

    def margins(self, key: str, ratio: int, change: Change, dtype: str = "float32") -> Margins:
        """Margins where `change` was done to all states of a ratio, (num_states, dim) each. Kept under `key`."""
        file = self._folder / f"{key.replace(',', '+')}@{ratio}.npy"
        if file.exists():
            return np.asarray(np.load(file))
        if dtype not in self._backends:
            self._backends[dtype] = FbnlBackend(self.opened, dtype=dtype)
        margins = self._score(self._backends[dtype], ratio, change)
        np.save(file, margins)
        return margins

    def _score(self, backend: FbnlBackend, ratio: int, change: Change) -> Margins:
        changed = {
            p: PassageStates(change(s.states), s.window_tokens, ratio, s.truncated, s.text_digest)
            for p, s in self.states(self.scored, ratio)
        }
        prompts = {q: backend.prompt(text) for q, text in self.queries.items()}
        pairs = [(prompts[q], changed[p]) for q, ids in self.candidates.items() for p in ids]
        margins = score_passages(backend, pairs).reshape(len(self.queries), -1)
        if not np.isfinite(margins).all():
            raise SystemExit("a margin is not finite")
        return margins
