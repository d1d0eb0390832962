"""`python -m training start`: training texts -> a checkpoint with a trimmed vocabulary and soft-MaxSim weights."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from training import soft_maxsim, vocabulary
from training.checkpoint_dir import MINI, Checkpoint, save
from training.collections_io import read_jsonl
from training.teacher import MiniLM, minilm_folder


def start(
    data: Path,
    out: Path,
    vocab_size: int = 15000,
    seed: int = 0,
    num_texts: int = 30000,
    strength: soft_maxsim.Strength | None = None,
) -> None:
    """Deterministic for a seed; needs `texts.jsonl` of the data step and the MiniLM package."""
    torch.manual_seed(seed)
    texts = [row["text"] for row in read_jsonl(data / "texts.jsonl")]
    tokenizer = vocabulary.trim((minilm_folder() / "tokenizer.json").read_text(encoding="utf-8"), texts, vocab_size)
    sample = random.Random(seed).sample(texts, min(num_texts, len(texts)))
    cache = out / "vectors.pt"
    if cache.exists():
        vectors = torch.load(cache, weights_only=True)
    else:
        vectors = vocabulary.token_vectors(tokenizer, MiniLM(), sample)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(vectors, cache)
    model = soft_maxsim.empty_model(soft_maxsim.Shape(tokenizer.get_vocab_size()))
    checkpoint = Checkpoint(model, tokenizer, MINI)
    yes, no = checkpoint.answers
    soft_maxsim.initialise(
        model,
        vocabulary.principal(vectors, soft_maxsim.WIDTH),
        vocabulary.rarity(tokenizer, texts),
        special=range(len(vocabulary.SPECIAL)),
        cls=vocabulary.SPECIAL.index("[CLS]"),
        yes=yes,
        no=no,
        strength=strength,
    )
    save(checkpoint, out)
