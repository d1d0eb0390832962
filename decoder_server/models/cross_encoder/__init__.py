"""Rerankers that read query and passage together, each the way it was published."""

from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.model import CrossEncoder
from decoder_server.models.cross_encoder.profiles import Profile
from decoder_server.models.cross_encoder.templates import Question, TextPair

__all__ = ["CrossEncoder", "Profile", "Question", "TextPair", "open_cross_encoder"]
