"""How much may be damaged: what is left out is named, and the end comes at a stated number."""

import sys


class Damage:
    """Name each picture that cannot be used, and stop when they are more than allowed.

    Args:
        allowed: how many may be left out.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.count = allowed, 0

    def add(self, what: object) -> None:
        """Leave one picture out.

        Raises:
            ValueError: there are more than allowed.
        """
        self.count += 1
        if self.count > self.allowed:
            raise ValueError(
                f"{what}; that makes {self.count} damaged, and --damaged allows {self.allowed}"
            )
        print(f"left out: {what}", file=sys.stderr)
