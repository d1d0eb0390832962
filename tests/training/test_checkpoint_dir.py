from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, T5Gemma2ForConditionalGeneration

from training.model import TrainableCheckpoint, mean_pool

SHIPPED = Path(__file__).parents[2] / "preread" / "models" / "preread-mini"


def test_a_saved_checkpoint_is_bf16_with_the_embedding_once(
    tiny: Callable[[int], TrainableCheckpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(0)
    checkpoint.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert sum("embed_tokens.weight" in name or "lm_head" in name for name in weights.keys()) == 1  # noqa: SIM118
        assert all(weights.get_tensor(name).dtype == torch.bfloat16 for name in weights.keys())  # noqa: SIM118
    assert AutoConfig.from_pretrained(tmp_path).model_type == "t5gemma2"
    for dtype in (torch.float32, torch.bfloat16):
        whole = T5Gemma2ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        assert {value.dtype for value in whole.state_dict().values()} == {dtype}
    loaded = TrainableCheckpoint.load(tmp_path)
    assert loaded.settings == checkpoint.settings
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(value.bfloat16().float(), loaded.model.state_dict()[name]), name


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        TrainableCheckpoint.load(tmp_path)


def test_the_shipped_checkpoint_is_small_and_ranks() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 25_000_000
    assert isinstance(T5Gemma2ForConditionalGeneration.from_pretrained(SHIPPED), T5Gemma2ForConditionalGeneration)
    checkpoint = TrainableCheckpoint.load(SHIPPED)
    checkpoint.model.eval()
    passages = [
        "A program that shows photographs and lets you crop and rotate them.",
        "Treatment of malaria includes antimalarial drugs such as chloroquine.",
        "Fever, chills and headache are common signs of malaria infection.",
    ]
    queries = ["image viewer", "how is malaria treated", "what are the symptoms of malaria"]
    with torch.inference_mode():
        states, mask = checkpoint.encode(checkpoint.passage_ids(passages))
        for ratio in (1, 4):
            pooled, pooled_mask = mean_pool(states, mask, ratio)
            for i, prompt in enumerate(checkpoint.prompt_ids(queries, [""] * 3)):
                margins = checkpoint.margins([prompt] * 3, pooled, pooled_mask)
                assert int(margins.argmax()) == i, (ratio, queries[i], margins)
