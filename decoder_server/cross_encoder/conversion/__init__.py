"""A causal language model that answers in one column of its vocabulary, rewritten as a classifier with one score.

    source = CausalSource.open("ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b")
    with staged(Path("ctxl-1b")) as folder:
        convert(source, folder)

The classifier computes 1 row of the output embedding where the language model computes all of them.
Does not run either of them: tuning.health.parity does.
"""

from decoder_server.cross_encoder.conversion.source import COLUMN, CausalSource
from decoder_server.cross_encoder.conversion.staging import staged
from decoder_server.cross_encoder.conversion.writing import Advance, convert

__all__ = ["COLUMN", "Advance", "CausalSource", "convert", "staged"]
