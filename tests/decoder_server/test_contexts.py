"""A pass over the rest of prompts, on kept contexts, gives the margins of the whole pass, which are transformers'."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from checkpoint import Checkpoint
from checkpoint.synthetic import SHAPES, make_checkpoint
from decoder_server.models.fbnl.decoder import Decoder, KeysValues, Layout

YES, NO = 300, 301
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["two kv heads", "one kv head", "a window wider than prompts"])
def halves(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, T5Gemma2ForConditionalGeneration]:
    """Our decoder and transformers' model on the same weights; tiny's window of 8 is shorter than the prompts."""
    tiny = SHAPES["tiny"]
    shape = {
        "two kv heads": tiny,
        "one kv head": replace(tiny, num_key_value_heads=1),
        "a window wider than prompts": replace(tiny, sliding_window=512),
    }[request.param]
    path = make_checkpoint(tmp_path_factory.mktemp("contexts"), shape)
    checkpoint = Checkpoint.open(path)
    decoder = Decoder(checkpoint.decoder_config, checkpoint.decoder_tensors(torch.float32), checkpoint.eoi_id)
    return decoder, T5Gemma2ForConditionalGeneration.from_pretrained(path).eval()


@torch.inference_mode()
def oracle(model: T5Gemma2ForConditionalGeneration, prompt: list[int], states: torch.Tensor) -> float:
    logits = model(
        decoder_input_ids=torch.tensor([prompt]),
        encoder_outputs=BaseModelOutput(last_hidden_state=states[None]),
        attention_mask=torch.ones(1, len(states), dtype=torch.long),
    ).logits[0, -1]
    return float(logits[YES] - logits[NO])


def joined(parts: list[list[KeysValues]]) -> list[KeysValues]:
    """Contexts of several pairs, packed; or of one pair, one after the other."""
    return [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in zip(*parts, strict=True)]


@pytest.mark.parametrize("splits", [(1,), (9,), (20,), (5, 12), (9, 9)])
def test_margins_on_kept_contexts_are_those_of_the_whole_pass(
    halves: tuple[Decoder, T5Gemma2ForConditionalGeneration], splits: tuple[int, ...]
) -> None:
    """Prompts of 21 and 26 tokens over passages of 1, 6 and 6 states, each cut at every one of `splits`."""
    decoder, model = halves
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(300, 500, (n,), generator=generator).tolist() for n in (21, 26, 21)]
    states = [torch.randn(n, decoder.config.hidden_size, generator=generator) for n in (1, 6, 6)]
    expected = [oracle(model, prompt, s) for prompt, s in zip(prompts, states, strict=True)]

    counts = [len(s) for s in states]
    whole = Layout([len(p) for p in prompts], counts, CPU)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    margins = decoder.margins(ids, decoder.passage_kv(torch.cat(states)), whole, YES, NO)
    np.testing.assert_allclose(margins.numpy(), expected, atol=1e-4, rtol=0)

    contexts = [list(decoder.passage_kv(s)) for s in states]
    borders = (0, *sorted(set(splits)))
    for begin, end in pairwise(borders):
        for i, prompt in enumerate(prompts):  # each by itself, as a tier would make it
            layout = Layout([end - begin], [counts[i]], CPU, [begin])
            added = decoder.prompt_kv(torch.tensor(prompt[begin:end]), contexts[i], layout)
            passage = [(k[begin:], v[begin:]) for k, v in contexts[i]]
            prefix = [(k[:begin], v[:begin]) for k, v in contexts[i]]
            contexts[i] = joined([prefix, added])
            contexts[i] = joined([contexts[i], passage])
    rest = [prompt[borders[-1] :] for prompt in prompts]
    layout = Layout([len(p) for p in rest], counts, CPU, [borders[-1]] * 3)
    ids = torch.tensor([token for prompt in rest for token in prompt])
    continued = decoder.margins(ids, joined(contexts), layout, YES, NO)
    np.testing.assert_allclose(continued.numpy(), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(continued.numpy(), margins.numpy(), atol=1e-5, rtol=0)


def test_pairs_with_and_without_a_kept_prefix_share_a_pass(
    halves: tuple[Decoder, T5Gemma2ForConditionalGeneration],
) -> None:
    decoder, model = halves
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(300, 500, (23,), generator=generator).tolist()
    states = [torch.randn(n, decoder.config.hidden_size, generator=generator) for n in (4, 9)]
    passages = [list(decoder.passage_kv(s)) for s in states]
    kept = decoder.prompt_kv(torch.tensor(prompt[:15]), passages[0], Layout([15], [4], CPU))
    context = joined([joined([kept, passages[0]]), passages[1]])
    layout = Layout([8, 23], [4, 9], CPU, [15, 0])
    margins = decoder.margins(torch.tensor(prompt[15:] + prompt), context, layout, YES, NO)
    np.testing.assert_allclose(margins.numpy(), [oracle(model, prompt, s) for s in states], atol=1e-4, rtol=0)
