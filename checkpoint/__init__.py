"""A checkpoint on disk: its files, texts, tensors and identity. Knows neither gRPC nor the store."""

from checkpoint.files import CheckpointError
from checkpoint.model import Checkpoint, EncoderIdentity
from checkpoint.settings import CheckpointSettings
from checkpoint.text import TextTokenizer, TokenizedPassage, TokenizedPrompt

__all__ = [
    "Checkpoint", "CheckpointError", "CheckpointSettings", "EncoderIdentity", "TextTokenizer", "TokenizedPassage",
    "TokenizedPrompt",
]  # fmt: skip
