"""How much may be damaged: what is left out is named, and the end comes at a stated number."""

import sys

import torch
from torch import distributed


class Damage:
    """Name each picture that cannot be used, and stop when they are more than allowed.

    Args:
        allowed: how many may be left out; None where no option allows any, as each counts.
    """

    def __init__(self, allowed: int | None = 0) -> None:
        self.allowed, self._opening = allowed, 0
        self._met: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """How many have been left out."""
        return self._opening + (0 if self._met is None else int(self._met.sum()))

    def share(self, pictures: int) -> None:
        """From here on count each of so many pictures once, together with the workers of a loader.

        What one worker notes in this memory, all others and the process that started them see.
        """
        if self.allowed:
            self._met = torch.zeros(pictures, dtype=torch.uint8).share_memory_()

    def gather(self) -> None:
        """Count what the other processes of the run left out, too; all call this together."""
        if self._met is not None and distributed.is_initialized():
            distributed.all_reduce(self._met, distributed.ReduceOp.MAX)

    def add(self, what: object, picture: int | None = None) -> None:
        """Leave one picture out.

        Args:
            what: is the matter, and where.
            picture: its number, when it may be met again.

        Raises:
            ValueError: there are more than allowed.
        """
        if picture is None or self._met is None:
            self._opening += 1
        elif self._met[picture]:
            return
        else:
            self._met[picture] = 1
        if self.allowed is None:
            raise ValueError(f"{what}; each picture of the protocol counts, none may be left out")
        if self.count > self.allowed:
            raise ValueError(f"{what}; that makes {self.count} damaged, and {self.allowed} allowed")
        print(f"left out: {what}", file=sys.stderr)
