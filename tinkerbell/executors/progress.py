"""Marks of progress: what an executor process gets done, counted, so that its sign of life can tell work from a hang.

Executors call `mark` wherever their work has come a piece further: after a micro-batch, a token, a layer, a tensor. Its
cost is that of an addition. A server kills an executor whose call made no mark for `executor_silence_s`.
"""


class Progress:
    """A count that only grows; of one process."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> None:
        """Something was done. From any thread: a mark that is lost to another is no loss."""
        self.marks += 1


PROGRESS = Progress()
"""Of this process: an executor has one to itself."""

mark = PROGRESS.mark
