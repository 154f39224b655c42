"""What the tests of several operations share."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Shapes(TorchDispatchMode):
    """Record the number of elements of the largest tensor that owns new memory."""

    def __init__(self, inputs):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                pointer = leaf.untyped_storage().data_ptr()
                if pointer not in self.known:
                    size = leaf.untyped_storage().nbytes() // leaf.element_size()
                    self.largest = max(self.largest, size, leaf.numel())
        return result


@pytest.fixture
def shapes_of():
    """Return a context that sees what is allocated, beside the tensors that it is given."""
    return Shapes
