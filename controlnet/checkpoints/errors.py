"""The one error of everything that reads or writes checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, what it holds and what was expected."""
