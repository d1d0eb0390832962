"""The training loop: groups -> encode once -> pool at two ratios -> margins -> loss -> AdamW."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from training.groups import Sampler, Step, TeacherVectors, TrainingGroup
from training.model import TrainableCheckpoint, group_loss, mean_pool
from training.recipe import Recipe


class Trainer:
    """State of one run; `run` goes from `step` to the recipe's last step."""

    def __init__(
        self,
        checkpoint: TrainableCheckpoint,
        groups: Iterable[TrainingGroup],
        recipe: Recipe,
        out: Path,
        vectors: TeacherVectors | None = None,
    ) -> None:
        self.checkpoint, self.recipe, self.out = checkpoint, recipe, out
        torch.manual_seed(recipe.seed)
        self.model: Any = checkpoint.model.train()
        self.device: torch.device = self.model.device
        encoder, decoder = self.model.model.encoder, self.model.model.decoder
        encoder.vision_tower.requires_grad_(False)
        encoder.multi_modal_projector.requires_grad_(False)
        self.sampler = Sampler(groups, checkpoint, recipe, vectors)
        self.peft: Any = None
        if recipe.lora_rank:  # on every attention and MLP projection of both halves, in place
            from peft import LoraConfig, get_peft_model

            names = r".*(text_model|decoder)\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
            lora = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=names)
            self.peft = get_peft_model(self.model, lora)
        if recipe.compile:
            for layer in [*encoder.text_model.layers, *decoder.layers]:
                layer.compile(dynamic=True)
        embedding = encoder.text_model.embed_tokens.weight
        rest = [p for p in self.model.parameters() if p.requires_grad and p is not embedding]
        rates: list[dict[str, Any]] = [{"params": rest, "factor": 1.0}]
        if embedding.requires_grad:
            rates.append({"params": [embedding], "factor": recipe.embedding_rate, "weight_decay": 0.0})
        self.parameters = [p for group in rates for p in group["params"]]
        decay = recipe.weight_decay
        self.optimizer = torch.optim.AdamW(rates, lr=0.0, betas=(0.9, 0.98), weight_decay=decay, fused=True)
        self.step = 0
        self._sums: dict[str, torch.Tensor] = {}  # of the weights at so many of recipe.mean_with
        self._num_summed = self._num_warm = 0
        self._workers: ThreadPoolExecutor | None = None
        if (count := recipe.batches_per_step) > 1 and self.device.type == "cpu":
            # A thread a batch, none inside an operation.
            self._workers = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, number: int, batch: Step) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        """Loss of batch `number` (the sum over one low and one high ratio) and its gradients. Safe in several threads
        at once, which share nothing but the weights."""
        recipe, (num_queries, width) = self.recipe, batch.candidates.shape
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
        pairs = batch.valid.flatten().nonzero()[:, 0]
        prompts = [batch.prompts[int(i) // width] for i in pairs]
        rows = batch.candidates.flatten()[pairs].to(self.device)
        valid, teacher = batch.valid.to(self.device), batch.teacher.to(self.device)
        terms = recipe.distil, recipe.distil_temperature, recipe.binary
        loss = torch.zeros((), device=self.device)
        bf16, alone = recipe.precision == "bf16", self._workers is None
        # Threads would share autocast's cache of cast weights, and by `backward` sum gradients in an order of chance.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=alone):
            states, mask = self.checkpoint.encode(batch.passages)  # (num_passages, num_tokens, dim)
            for ratios in filter(None, (recipe.ratios_low, recipe.ratios_high)):
                ratio = ratios[int(torch.randint(len(ratios), (), generator=generator))]
                margin = self.checkpoint.pair_margins(prompts, rows, *mean_pool(states, mask, ratio))
                table = torch.zeros(num_queries * width, device=self.device).index_put((pairs.to(self.device),), margin)
                loss = loss + group_loss(table.view(num_queries, width), valid, teacher, *terms)
        return float(loss.detach()), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def advance(self) -> float:
        """One optimiser step, returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * group["factor"] * self.recipe.rate(self.step)
        first = self.step * self.recipe.batches_per_step
        numbers = range(first, first + self.recipe.batches_per_step)
        batches = [self.sampler.step(number) for number in numbers]  # the sampler is no work for several threads
        self._num_warm += 1
        if self._workers is None:
            made = list(map(self.gradients, numbers, batches))
        elif self.recipe.compile and self._num_warm <= 3:  # nor is compiling
            pairs = zip(numbers, batches, strict=True)
            made = [self._workers.submit(self.gradients, *pair).result() for pair in pairs]
        else:
            made = list(self._workers.map(self.gradients, numbers, batches))
        for parameter, *parts in zip(self.parameters, *(gradients for _, gradients in made), strict=True):
            known = [part for part in parts if part is not None]
            parameter.grad = torch.stack(known).mean(0) if len(known) > 1 else known[0] if known else None
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        if self.step in self.recipe.mean_with:
            self._add_weights()
        return sum(loss for loss, _ in made) / len(made)

    def run(self, evaluate: Callable[[], str] | None = None) -> None:
        """Train to the last step, saving the resume state and evaluating on the way, then write the checkpoint."""
        recent: list[float] = []
        started = time.monotonic()
        with tqdm(total=self.recipe.steps, initial=self.step, desc="train", mininterval=10) as bar:
            while self.step < self.recipe.steps:
                recent = [*recent[-99:], self.advance()]
                loss = sum(recent) / len(recent)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(1)
                last = self.step == self.recipe.steps
                if self.step % self.recipe.save_every == 0 or last:
                    self.save_state()
                if evaluate and (self.step % self.recipe.evaluate_every == 0 or last):
                    progress = f"step {self.step}, {time.monotonic() - started:.0f} s, loss {loss:.4f}"
                    self.model.eval()
                    with torch.compiler.set_stance("force_eager"):  # inference mode would compile every layer again
                        bar.write(f"{progress}, {evaluate()}")
                    self.model.train()
        if self._sums:
            self._add_weights()
            self.model.load_state_dict({k: s / self._num_summed for k, s in self._sums.items()}, strict=False)
        if self.peft is not None:
            self.peft.merge_and_unload()
        self.checkpoint.save(self.out)

    def _add_weights(self) -> None:
        for name, weight in self.model.state_dict().items():
            if weight.is_floating_point():
                self._sums[name] = self._sums.get(name, 0) + weight.detach().clone()
        self._num_summed += 1

    def save_state(self) -> None:
        """Everything a resumed run needs, written aside and renamed."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}
        aside = self.out / "state.tmp"
        torch.save(state | {"sums": self._sums, "num_summed": self._num_summed}, aside)
        aside.replace(self.out / "state.pt")

    def resume(self) -> None:
        """Go on from the state in `out`; FileNotFoundError where there is none."""
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved["factor"] = group["factor"]  # this recipe's
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self._sums, self._num_summed = state["step"], state["sums"], state["num_summed"]
