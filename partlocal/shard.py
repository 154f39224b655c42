"""Which of many rows a rank holds, and what it holds of a tensor."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Which of the classes a rank holds: equal shares in rank order, the last ones may be smaller.

    >>> [(s.start, s.stop) for s in (Shard(10, rank, 4) for rank in range(4))]
    [(0, 3), (3, 6), (6, 9), (9, 10)]

    Args:
        classes: of all ranks.
        rank: which of the group.
        ranks: of the group.
    """

    classes: int
    rank: int
    ranks: int

    @property
    def share(self) -> int:
        """Classes a rank, but for the last ones."""
        return -(-self.classes // self.ranks)

    @property
    def start(self) -> int:
        """The first class."""
        return min(self.rank * self.share, self.classes)

    @property
    def stop(self) -> int:
        """The class behind the last one."""
        return min(self.start + self.share, self.classes)

    @property
    def count(self) -> int:
        """How many."""
        return self.stop - self.start


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor, outside of autograd, and any other as it is."""
    return getattr(tensor, "_local_tensor", tensor)
