"""From a configuration to a loaded model. Runs on the model's thread."""

from decoder_server.config import ModelConfig
from decoder_server.models.backend import Backend

# Fewest and most tokens per batch, by device: below the first a pass is mostly fixed cost, above the second it is no
# faster per token.
BATCH_TOKENS = {"cpu": (1024, 8192), "cuda": (16_384, 65_536)}


def load_model(model: ModelConfig) -> Backend:
    """Loads a model as its checkpoint, or the configuration, says.
    Raises CheckpointError for files that cannot be served, ValueError for a device, dtype or runtime not to be had.
    """
    import torch  # seconds to import; only a process that serves should pay

    torch.set_flush_denormal(True)  # a setting of the thread, and this is the one that computes
    if is_fbnl(model):
        from checkpoint import Checkpoint
        from decoder_server.models.fbnl.backend import FbnlBackend

        checkpoint = Checkpoint.open(
            model.checkpoint, max_passage_tokens=model.max_passage_tokens, neutralise=not model.read_control_tokens
        )
        return FbnlBackend(checkpoint, device=model.device, dtype=model.dtype, budgets=model.kv_caches)
    from decoder_server.models.cross_encoder.loading import open_cross_encoder

    if model.read_control_tokens:
        raise ValueError(
            f"read_control_tokens is on for {model.checkpoint}, a cross-encoder, which reads control tokens in texts "
            "as plain text; expected it for fbnl models alone (--model CHECKPOINT,read-control-tokens=yes)"
        )
    return open_cross_encoder(
        model.checkpoint,
        device=model.device,
        dtype=model.dtype,
        runtime=model.runtime,
        profile=model.profile or None,
        max_tokens=model.max_passage_tokens,
        trust_remote_code=model.trust_remote_code,
    )


def is_fbnl(model: ModelConfig) -> bool:
    """Whether the model reads states; CheckpointError where there is no such checkpoint."""
    if model.backend != "auto":
        return model.backend == "fbnl"
    from checkpoint.files import read_json, resolve
    from checkpoint.model import MODEL_TYPE

    # Loading a configuration without a type as fbnl names the missing field.
    return bool(read_json(resolve(model.checkpoint) / "config.json").get("model_type", MODEL_TYPE) == MODEL_TYPE)
