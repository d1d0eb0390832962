"""A cross-encoder's files, checked against each other before a large tensor is read, and its transformers model.
What a checkpoint declares about its own arithmetic (config.json and sentence-transformers' files next to it) is applied
by transformers or by the profile, or is an error. Nothing in a loaded model is random.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer

from checkpoint.files import STORAGE, CheckpointError, check_fields, one_line, read_json
from checkpoint.model import HEAD
from checkpoint.tensors import StoredTensors
from decoder_server.models.cross_encoder.profiles import GENERIC, Profile
from decoder_server.models.cross_encoder.templates import PairReader

# Older names of fields, by the one that classes have today.
RENAMED = {
    "rope_parameters": {
        "global_rope_theta", "local_rope_theta", "partial_rotary_factor", "rope_local_base_freq", "rope_scaling",
        "rope_theta",
    },
    "layer_types": {"global_attn_every_n_layers", "max_window_layers", "sliding_window_pattern"},
}  # fmt: skip
# Fields that a model reads where its configuration has them, though its class does not name them (transformers 5.23).
ALSO_READ = {
    "deberta": {"cls_dropout", "embedding_size", "pooler_hidden_size", "talking_head"},
    "deberta-v2": {
        "attention_head_size", "cls_dropout", "conv_act", "conv_groups", "conv_kernel_size", "embedding_size",
        "norm_rel_ebd", "pooler_hidden_size", "position_buckets", "share_att_key",
    },
    "modernbert": {"layer_norm_eps"},  # its authors store it next to norm_eps, which is read
    "qwen2": {"head_dim"},
}  # fmt: skip
# Modules of sentence-transformers that a profile stands for: the model itself, and the answer tokens' logits.
MODULES = frozenset({"Transformer", "LogitScore"})
# Heads that a checkpoint keeps from its training and a score is not read from; and, where no class has one, the pooler
# that they stood on. A tensor of these names that the model does use is never left over.
_OTHER_HEADS = re.compile(
    r"(?:(?:cls\.(?:predictions|seq_relationship)|lm_head|lm_predictions|mask_predictions|decoder)\.(?:\w+\.)*|"
    r"(?:\w+\.)?pooler\.dense\.)(?:weight|bias|gamma|beta)$"
)
PROJECTOR = ("projector.0.weight", "projector.2.weight")  # listwise: two layers without biases, a ReLU between them
# Tensors that a head reads besides the transformers model, and an output embedding that it has no use for.
READ_BY_HEAD = {"score": ("score.weight", HEAD), "vocabulary": (HEAD,), "listwise": (*PROJECTOR, HEAD)}
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spm.model", "tokenizer.model",
    "tekken.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint's opened files, for every runtime to load from."""

    directory: Path
    profile: Profile
    config: Any  # transformers' configuration object
    raw: dict[str, Any]  # config.json as it stands
    loaded: Any  # transformers' tokenizer
    tokenizer: Tokenizer  # inside of it
    reader: PairReader
    tensors: StoredTensors
    pad_id: int
    typed: bool  # whether the model reads segment ids
    trust_remote_code: bool

    @classmethod
    def open(cls, directory: Path, raw: dict[str, Any], profile: Profile, *, trust_remote_code: bool) -> Self:
        """Reads all but the weights."""
        from transformers import AutoTokenizer

        config = _load_config(directory, profile, trust_remote_code=trust_remote_code)
        if not any((directory / name).exists() for name in TOKENIZER_FILES):
            # Given none of these, transformers makes a tokenizer that reads every text as nothing.
            raise CheckpointError(f"{directory}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
        try:
            loaded: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            tokenizer: Tokenizer = loaded.backend_tokenizer
        except Exception as exc:  # a missing file, a broken one and an unknown class raise unrelated types
            raise CheckpointError(f"{directory}: no tokenizer that can be read ({one_line(exc)})") from exc
        if len(tokenizer.encode("a query and a passage", add_special_tokens=False).ids) == 0:
            raise CheckpointError(f"{directory}: the tokenizer reads every text as nothing; files are missing")
        size, rows = tokenizer.get_vocab_size(with_added_tokens=True), config.vocab_size
        if size > rows:
            raise CheckpointError(f"{directory}: the tokenizer has {size} tokens; the embedding has {rows} rows")
        # Encoders that count positions from the pad id want the configuration's; elsewhere padding is masked.
        candidates = (raw.get("pad_token_id"), loaded.pad_token_id, loaded.eos_token_id, 0)
        pad_id = next(id_ for id_ in candidates if isinstance(id_, int) and id_ >= 0)
        typed = int(raw.get("type_vocab_size") or 0) > 1 and "token_type_ids" in loaded.model_input_names
        reader, tensors = PairReader(tokenizer, profile), StoredTensors(directory)
        shared = profile, config, raw, loaded, tokenizer, reader, tensors
        return cls(directory, *shared, pad_id=pad_id, typed=typed, trust_remote_code=trust_remote_code)

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The transformers model below the profile's head, or with it where it is the model's own."""
        head, trust = self.profile.head, self.trust_remote_code and not self.profile.listwise
        kind = "AutoModelForSequenceClassification" if head == "classifier" else "AutoModel"
        how: dict[str, Any] = {"kind": kind, "config": self.config, "head": head, "trust_remote_code": trust}
        return load_transformer(self.directory, dtype, device, **how)

    def fingerprint(self) -> str:
        """sha256 over weights, tokenizer, configuration and profile: a second or two per gigabyte."""
        rest = json.dumps([self.raw, dataclasses.asdict(self.profile)], sort_keys=True)
        return hashlib.sha256("\n".join([self.tensors.digest(), self.tokenizer.to_str(), rest]).encode()).hexdigest()


def _load_config(directory: Path, profile: Profile | None = None, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration object, checked against the profile that it is served by, if there is one."""
    from transformers import AutoConfig

    path = directory / "config.json"
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as exc:  # strict config classes and remote code raise several unrelated types
        raise CheckpointError(f"{path}: cannot be read as a configuration ({one_line(exc)})") from exc
    if profile is None:
        return config
    if not profile.needs_remote_code:  # else the checkpoint's own Python reads its declarations
        raw, kind = read_json(path), type(config)
        own = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        # Fields that transformers' class, or the model that reads its configuration, takes into account.
        applied: set[str] = own | set(getattr(kind, "attribute_map", {})) | STORAGE
        applied |= ALSO_READ.get(str(raw.get("model_type")), set())
        applied = applied.union(*(old for new, old in RENAMED.items() if new in own))
        if profile.head != "classifier":  # transformers attends both ways for unpadded batches only
            applied.discard("use_bidirectional_attention")
        check_fields(str(path), raw, {}, applied)
    _check_modules(directory, profile)
    if profile.model == GENERIC:  # no profile describes changes that sentence-transformers would make to texts first
        path = directory / "sentence_bert_config.json"
        if read_json(path, optional=True).get("do_lower_case"):
            raise CheckpointError(f"{path}: do_lower_case is true, which is not applied here; expected false")
        path = directory / "config_sentence_transformers.json"
        found = read_json(path, optional=True)
        name, prompts = found.get("default_prompt_name"), found.get("prompts") or {}
        if name is not None and (not isinstance(prompts, dict) or prompts.get(name)):
            told = "a prompt needs a profile with a template (docs/cross-encoders.md)"
            raise CheckpointError(f"{path}: default_prompt_name is {name!r}; {told}")
    return config


def _check_modules(directory: Path, profile: Profile) -> None:
    """Heads that sentence-transformers would put behind the model."""
    for module in read_json(directory / "modules.json", optional=True, kind=list[dict[str, Any]]):
        kind, place = str(module.get("type", "none")), directory / str(module.get("path") or "")
        library, name = kind.startswith("sentence_transformers."), kind.rpartition(".")[2]
        apart = place.resolve() != directory.resolve()
        weighs = apart and any(path.suffix in (".safetensors", ".bin") for path in place.glob("*"))
        # A published model's own module is part of its recipe, so the profile that goes by its id has it.
        known = name in MODULES if library else profile.model != GENERIC
        if weighs or not known:
            raise CheckpointError(
                f"{directory / 'modules.json'}: lists the module {kind} ({place.name}), which is not applied here; "
                f"expected {' and '.join(sorted(MODULES))} alone"
            )
        if name != "LogitScore" or not library:
            continue
        # The answer tokens that sentence-transformers reads, where the profile gives ids for its own.
        path = place / "config.json"
        found = read_json(path, optional=True)
        given = tuple(answer for answer in (profile.yes, profile.no) if answer is not None)
        ids = profile.answer_ids if any(isinstance(answer, str) for answer in given) else given
        for key, expected in zip(("true_token_id", "false_token_id"), (*ids, None), strict=False):
            if ids and found.get(key) != expected:
                told = f"{key} is {found.get(key)!r}; the profile {profile.model!r} reads token {expected!r}"
                raise CheckpointError(f"{path}: {told}")


def load_transformer(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kind: str,  # name of the auto class
    config: Any = None,  # None: loaded here
    head: str = "",  # of the profile: it may read tensors that transformers does not
    trust_remote_code: bool = False,
) -> Any:
    """A model of transformers in evaluation mode, with every stored tensor in it or accounted for.
    transformers draws missing weights at random and leaves out those it does not use; both are errors here.
    """
    import transformers

    tensors = StoredTensors(directory)
    tensors.check_formats()
    config = config or _load_config(directory, trust_remote_code=trust_remote_code)
    auto: Any = getattr(transformers, kind)
    # Shapes that do not match are rejected by name; without a dtype it keeps the stored one, which may be float16.
    how: dict[str, Any] = {"ignore_mismatched_sizes": True, "dtype": dtype, "output_loading_info": True}
    try:
        with quiet():
            if tensors.quantized:  # transformers reads a part of them: it is given plain numbers
                plain = copy.deepcopy(config)
                if hasattr(plain, "quantization_config"):
                    del plain.quantization_config
                with torch.device("meta"):
                    exact = type(auto.from_config(plain, trust_remote_code=trust_remote_code))
                state = {name: tensors.read(name, dtype) for name in tensors.weights}
                model, info = exact.from_pretrained(None, config=plain, state_dict=state, **how)
            else:
                how |= {"local_files_only": True, "use_safetensors": True, "trust_remote_code": trust_remote_code}
                model, info = auto.from_pretrained(directory, config=config, **how)
    except KeyError as exc:  # of a table of transformers', such as that of the activation functions
        raise CheckpointError(f"{directory / 'config.json'}: names {exc}, which transformers does not have") from exc
    except Exception as exc:  # files, remote code: unrelated types, one meaning
        raise CheckpointError(f"{directory}: the model cannot be loaded ({one_line(exc)})") from exc
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(f"{directory}: {name} has the shape {tuple(found)}; config.json says {tuple(wanted)}")
    tensors.refuse_missing(info["missing_keys"])
    left = set(info["unexpected_keys"]).difference(READ_BY_HEAD.get(head, ()))
    if kind == "AutoModelForSequenceClassification":
        left = {name for name in left if not _OTHER_HEADS.match(name)}
    tensors.refuse_unused(left)
    return model.to(device).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers draws bars and logs a table of missing weights; the caller reports both."""
    from transformers.utils import logging as said

    talk: Any = said  # untyped in part
    level, bar = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity(logging.CRITICAL)
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bar:
            talk.enable_progress_bar()
