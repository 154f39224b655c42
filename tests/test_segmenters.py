import inspect
from collections import namedtuple

import pytest
import torch
from torch import nn

from partlocal.labels import HELEN
from partlocal.segmenters import LogitsAdapter

Output = namedtuple("Output", ["loss", "logits"])
PAIR = namedtuple("PAIR", ["main", "auxiliary"])


class Holder:
    def __init__(self, out):
        self.out = out


class Segmenter(nn.Module):
    def __init__(self, wrap, channels=11):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=4)
        self.wrap = wrap
        self.seen = None

    def forward(self, x):
        self.seen = x
        return self.wrap(self.conv(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, x + 1),
        lambda x: [x, x + 1, x + 2],
        lambda x: {"aux": x + 1, "out": x},
        lambda x: {"logits": x},
        lambda x: Output(loss=x.sum(), logits=x),
        lambda x: PAIR(x, x + 1),
        Holder,
        lambda x: {"out": [x, x + 1]},
    ],
)
def test_adapter_outputs(wrap):
    torch.manual_seed(0)
    segmenter = Segmenter(wrap)
    adapter = LogitsAdapter(segmenter, HELEN, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25), size=64)
    logits = adapter(torch.full((2, 3, 100, 80), 0.9))
    assert logits.shape == (2, 11, 64, 64)
    expected = torch.tensor([2.0, 2.5, 2.4]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    torch.testing.assert_close(segmenter.seen, expected)
    raw = segmenter.conv(segmenter.seen)
    torch.testing.assert_close(logits[..., 32, 32], raw[..., 8, 8])


def test_adapter_module():
    adapter = LogitsAdapter(Segmenter(tuple), HELEN, (0.5,) * 3, (0.5,) * 3, size=(64, 32))
    adapter.module.wrap = lambda x: x
    assert adapter.freeze().train().training is False
    assert not any(p.requires_grad for p in adapter.parameters())
    assert adapter(torch.rand(1, 3, 50, 50)).shape == (1, 11, 64, 32)
    assert "labels=Helen, size=(64, 32)" in repr(adapter)


def test_adapter_errors():
    constants = ((0.5,) * 3, (0.5,) * 3, 64)
    with pytest.raises(
        ValueError,
        match=r"Segmenter must return .* with n = 11 \(as Helen\); got \[1, 5, 16, 16\]",
    ):
        LogitsAdapter(Segmenter(lambda x: x, 5), HELEN, *constants)(torch.rand(1, 3, 64, 64))
    for size in (0, (64,), 6.4):
        with pytest.raises(
            ValueError, match=r"size must be two positive whole numbers .height, wi"
        ):
            inspect.unwrap(LogitsAdapter.__init__)(
                LogitsAdapter.__new__(LogitsAdapter), Segmenter(tuple), HELEN, *constants[:2], size
            )
    with pytest.raises(TypeError, match=r"module must return logits as a tensor, .*; got str"):
        LogitsAdapter(Segmenter(lambda x: "logits"), HELEN, *constants)(torch.rand(1, 3, 64, 64))
