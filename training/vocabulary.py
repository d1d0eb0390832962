"""A trimmed WordPiece vocabulary with a starting vector and a rarity for every piece.

Pieces are a subset of MiniLM's, so the teacher can read text cut by the trimmed tokenizer. A word that lost its own
piece falls apart into shorter pieces, down to single letters; only unseen scripts become [UNK].
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm  # type: ignore[import-untyped]

from training.teacher import MiniLM

SPECIAL = ("[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]")


def trim(tokenizer_json: str, texts: list[str], size: int, corpus_share: float = 0.65) -> Tokenizer:
    """Keep letters, then the pieces most frequent in `texts`, then MiniLM's own order (roughly English frequency)."""
    full = Tokenizer.from_str(tokenizer_json)
    full.no_padding()
    full.no_truncation()
    old = sorted(full.get_vocab().items(), key=lambda item: item[1])
    counts: Counter[str] = Counter()
    for start in range(0, len(texts), 2000):
        for encoding in full.encode_batch(texts[start : start + 2000], add_special_tokens=False):
            counts.update(encoding.tokens)
    latin = [piece for piece, _ in old if len(piece.removeprefix("##")) == 1 and ord(piece[-1]) < 0x250]
    keep = dict.fromkeys([*SPECIAL, "yes", "no", *latin])
    wanted = [piece for piece, _ in counts.most_common() if not piece.startswith("[") and is_latin(piece)]
    for piece in wanted:
        if len(keep) >= size * corpus_share:
            break
        keep.setdefault(piece)
    for piece, _ in old:
        if len(keep) >= size:
            break
        if not piece.startswith("[") and is_latin(piece):
            keep.setdefault(piece)
    state = json.loads(tokenizer_json)
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(keep)}
    state["added_tokens"] = [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, piece in enumerate(SPECIAL)
    ]
    state["post_processor"] = state["padding"] = state["truncation"] = (
        None  # templates write [CLS] and [SEP] themselves
    )
    return Tokenizer.from_str(json.dumps(state))


def is_latin(piece: str) -> bool:
    return all(ord(c) < 0x250 or 0x2010 <= ord(c) < 0x2040 for c in piece)


def rarity(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """log(N / (1 + passages with the piece)), a piece never seen as rare as one seen once. -> (vocab,)"""
    seen = torch.zeros(tokenizer.get_vocab_size())
    for start in range(0, len(texts), 2000):
        for encoding in tokenizer.encode_batch(texts[start : start + 2000], add_special_tokens=False):
            seen[torch.tensor(sorted(set(encoding.ids)), dtype=torch.long)] += 1
    return math.log(len(texts)) - torch.log1p(seen)


def token_vectors(tokenizer: Tokenizer, teacher: MiniLM, texts: list[str], max_tokens: int = 64) -> torch.Tensor:
    """One 384-d vector per piece: the mean of its teacher states over `texts`, shrunk to the piece read alone.

    -> (vocab, 384). A piece seen n times takes n/(n+4) of the mean in context and the rest of its lone state.
    """
    size = tokenizer.get_vocab_size()
    pieces = [tokenizer.id_to_token(i) for i in range(size)]
    to_teacher = torch.tensor([teacher.tokenizer.convert_tokens_to_ids(piece) for piece in pieces])
    cls, sep = teacher.tokenizer.cls_token_id, teacher.tokenizer.sep_token_id
    alone = torch.zeros(size, 384)
    for rows in torch.split(torch.arange(size), 1024):
        ids = torch.stack([torch.full_like(rows, cls), to_teacher[rows], torch.full_like(rows, sep)], 1)
        alone[rows] = teacher.token_states(ids, torch.ones_like(ids))[:, 1]
    total, count = torch.zeros(size, 384), torch.zeros(size)
    encoded = sorted((e.ids[:max_tokens] for e in tokenizer.encode_batch(texts, add_special_tokens=False)), key=len)
    for start in tqdm(range(0, len(encoded), 64), desc="piece vectors", mininterval=5):
        rows_ = encoded[start : start + 64]
        width = max(len(r) for r in rows_)
        own = torch.zeros(len(rows_), width, dtype=torch.long)  # pieces; 0 = padding
        for k, r in enumerate(rows_):
            own[k, : len(r)] = torch.tensor(r)
        inside = own > 0
        ids = torch.cat([torch.full((len(rows_), 1), cls), torch.where(inside, to_teacher[own], torch.tensor(0))], 1)
        states = teacher.token_states(ids, torch.cat([torch.ones(len(rows_), 1, dtype=torch.long), inside.long()], 1))[
            :, 1:
        ]
        total.index_add_(0, own[inside], states[inside])
        count.index_add_(0, own[inside], torch.ones(int(inside.sum())))
    weight = (count / (count + 4))[:, None]
    return weight * total / count.clamp(min=1)[:, None] + (1 - weight) * alone


def principal(vectors: torch.Tensor, width: int) -> torch.Tensor:
    """Centre and project on the strongest `width` directions, the strongest LAST. (vocab, dim) -> (vocab, width)"""
    centred = vectors - vectors[len(SPECIAL) :].mean(0)
    directions = torch.linalg.svd(centred[len(SPECIAL) :], full_matrices=False)[2][:width]
    return torch.flip(centred @ directions.T, [1])


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json without indentation, tokenizer_config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
