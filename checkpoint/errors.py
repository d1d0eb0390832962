"""The one error a checkpoint can raise."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the file, the value and what was expected."""
