from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from checkpoint.settings import KALM_PROMPT, CheckpointSettings
from training.model import MINI, TrainableCheckpoint, mean_pool
from training.start import SPECIAL, WIDTH, soft_maxsim_model, trim


def wordpiece(words: list[str]) -> str:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    pieces = [
        "[PAD]",
        "[unused0]",
        "[unused1]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{c}" for c in letters),
        *words,
    ]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer.to_str()


WORDS = [
    "yes",
    "no",
    "the",
    "retrieve",
    "passages",
    "that",
    "answer",
    "query",
    "red",
    "fish",
    "stone",
    "river",
    "cloud",
    "zebra",
]


def test_trim_keeps_frequent_words_and_spells_the_rest() -> None:
    tokenizer = trim(wordpiece(WORDS), ["zebra zebra river", "river"], size=62, corpus_share=1.0)
    assert tokenizer.encode("Zebra river").tokens == ["zebra", "river"]
    assert tokenizer.encode("cloud").tokens == ["c", "##l", "##o", "##u", "##d"]
    assert tokenizer.encode("[CLS] zebra [SEP]", add_special_tokens=False).ids[::2] == [4, 5]
    assert [tokenizer.token_to_id(s) for s in SPECIAL] == list(range(6))


def test_the_start_ranks_by_matching_words_at_every_ratio(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = trim(wordpiece(WORDS), [" ".join(WORDS)], size=80, corpus_share=1.0)
    size = tokenizer.get_vocab_size()
    checkpoint = TrainableCheckpoint(None, tokenizer, MINI)
    vectors, rarity = torch.randn(size, WIDTH), torch.full((size,), 4.0)
    checkpoint.model = soft_maxsim_model(vectors, rarity, checkpoint.answers, intermediate_size=32)
    checkpoint.save(tmp_path)
    loaded = TrainableCheckpoint.load(tmp_path)
    passages = ["the zebra the red fish", "the river the stone the", "the cloud the stone river"]
    prompts = loaded.prompt_ids(["zebra fish", "river", "cloud"], [""] * 3)
    with torch.inference_mode():
        states, mask = loaded.encode(loaded.passage_ids(passages))
        for ratio in (1, 2):
            pooled, pooled_mask = mean_pool(states, mask, ratio)
            margins = loaded.margins([prompts[0]] * 3, pooled, pooled_mask)
            assert int(margins.argmax()) == 0
    assert json.loads((tmp_path / "preread.json").read_text())["prompt_template"] == MINI.prompt_template


def test_kalm_settings_are_the_default() -> None:
    settings = CheckpointSettings()
    assert settings.passage_template == "<Document>: {passage}"
    assert settings.max_passage_tokens == 1024
    assert KALM_PROMPT.startswith("<bos><start_of_turn>user\n")
    assert KALM_PROMPT.endswith("<start_of_turn>model\n\n\n\n")


def test_a_long_query_is_cut_before_the_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(wordpiece(WORDS))
    tokenizer.add_special_tokens(list(SPECIAL))
    settings = CheckpointSettings(
        prompt_template="[CLS] {instruction} [SEP] {query} [SEP]", default_instruction="answer", max_query_tokens=3
    )
    checkpoint = TrainableCheckpoint(None, tokenizer, settings)
    ids = checkpoint.prompt_ids(["red fish red fish red"], [""])[0]
    assert tokenizer.decode(ids, skip_special_tokens=False).split() == [
        "[CLS]",
        "answer",
        "[SEP]",
        "red",
        "fish",
        "red",
        "[SEP]",
    ]
