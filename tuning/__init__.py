"""Measuring a checkpoint: judged collections in, quality with its uncertainty out.

Knows both halves of the model and the store; knows no server, and nothing but preread.cli imports it.
"""
