"""Rerankers that read query and passage together, each the way it was published."""

from decoder_server.cross_encoder.model import CrossEncoder
from decoder_server.cross_encoder.opening import open_cross_encoder
from decoder_server.cross_encoder.profiles import Profile
from decoder_server.cross_encoder.texts import Question, TextPair

__all__ = ["CrossEncoder", "Profile", "Question", "TextPair", "open_cross_encoder"]
