import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.landmarks import soft_argmax
from partlocal.parsing import ParsingNet


@given(st.integers(0, 19), st.integers(0, 11), st.sampled_from([1, 2, 5]))
@settings(max_examples=20)
def test_soft_argmax_properties(row, column, factor):
    # The peak of a sharp map is found, and a picture larger by a factor has its pixel centres
    # where repeating every pixel would put them.
    maps = torch.zeros(1, 2, 20, 12)
    maps[0, 0, row, column] = 60
    points = soft_argmax(maps, size=(20 * factor, 12 * factor))
    rows = np.repeat(np.arange(20), factor)
    columns = np.repeat(np.arange(12), factor)
    expected = [np.flatnonzero(columns == column).mean(), np.flatnonzero(rows == row).mean()]
    torch.testing.assert_close(points[0, 0], torch.tensor(expected).float(), atol=1e-4, rtol=0)
    middle = torch.tensor([12 * factor - 1, 20 * factor - 1]) / 2
    torch.testing.assert_close(points[0, 1], middle, atol=1e-4, rtol=0)


def test_landmarks_learn():
    torch.manual_seed(0)
    net = ParsingNet(1, 8, 1, bottleneck_size=4, input_size=32, grid=16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

    def batch(count):
        images = 0.3 * torch.rand(count, 3, 32, 32)
        corner = torch.randint(0, 28, (count, 2))
        for i, (column, row) in enumerate(corner.tolist()):
            images[i, :, row : row + 5, column : column + 5] += 0.6
        return images, (corner + 2.0).unsqueeze(1)

    for _ in range(60):
        images, points = batch(16)
        loss = (soft_argmax(net(images)) - points).norm(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, points = batch(64)
    assert (soft_argmax(net.eval()(images)) - points).norm(dim=-1).mean() < 2
