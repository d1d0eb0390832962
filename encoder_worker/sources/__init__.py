"""Passages out of files: what a line holds, where it stood, and why it was refused.

A source yields every item of its input, as a Passage or as a Refused; nothing is dropped in silence.
Does not know tokens, encoders or stores.
"""

from encoder_worker.sources.base import Fields, Passage, Place, Reason, Refused, SourceError
from encoder_worker.sources.source import FORMATS, Source

__all__ = ["FORMATS", "Fields", "Passage", "Place", "Reason", "Refused", "Source", "SourceError"]
