"""A checkpoint on disk: its files, texts, tensors and identity. Knows neither gRPC nor the store."""

from checkpoint.errors import CheckpointError
from checkpoint.identity import EncoderIdentity
from checkpoint.model import Checkpoint
from checkpoint.settings import CheckpointSettings
from checkpoint.text import TextTokenizer, TokenizedPassage, TokenizedPrompt

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointSettings",
    "EncoderIdentity",
    "TextTokenizer",
    "TokenizedPassage",
    "TokenizedPrompt",
]
