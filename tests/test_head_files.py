"""Rows that other projects saved."""

import pickle

import pytest
import torch

from partlocal import ArcFaceHead
from partlocal.head_files import read_rows

ROWS = torch.arange(44.0).view(11, 4)


@pytest.mark.parametrize("kind", ["tensor", "softmax", "checkpoint", "sampled"])
@pytest.mark.parametrize("ranks", [1, 3, 12])
def test_files_of_ranks(kind, ranks, tmp_path):
    """PartialFC gives the first ranks one class more; a rank may have none."""
    for rank, part in enumerate(ROWS.tensor_split(ranks)):
        rows = part.clone()
        state = {"weight": rows}
        if kind == "tensor":
            torch.save(rows, tmp_path / f"softmax_fc_gpu_{rank}.pt")
            continue
        if kind == "sampled":
            state |= {"weight_mom": rows + 1, "weight_activated": torch.empty(0, 0)}
        if kind == "checkpoint":
            optimizer = torch.optim.AdamW([torch.nn.Parameter(rows)])
            state = {
                "epoch": 3,
                "global_step": 7,
                "state_dict_backbone": {"conv": torch.ones(2, 2)},
                "state_dict_softmax_fc": state,
                "state_optimizer": optimizer.state_dict(),
                "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 7},
            }
            torch.save(torch.zeros(1, 9), tmp_path / f"softmax_fc_gpu_{rank}.pt")  # an older one
        name = "checkpoint_gpu" if kind == "checkpoint" else "softmax_fc_gpu"
        torch.save(state, tmp_path / f"{name}_{rank}.pt")
    rows = read_rows(tmp_path)
    assert torch.equal(torch.cat(rows), ROWS)
    head = ArcFaceHead(4, 11)
    head.load_rows(rows)
    assert torch.equal(head.weight, ROWS)


@pytest.mark.parametrize("name", ["W", "head.kernel", "weight"])
def test_transposed(name, tmp_path):
    path = tmp_path / "head.pt"
    torch.save({name: ROWS.T.contiguous(), "other": torch.ones(3)}, path)
    (rows,) = read_rows(path, transposed=True)
    assert torch.equal(rows, ROWS)
    (rows,) = read_rows([path], name=name, transposed=True)
    assert torch.equal(rows, ROWS)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no softmax_fc_gpu_<rank>\.pt"):
        read_rows(tmp_path)
    for rank in (0, 3):
        torch.save(ROWS, tmp_path / f"softmax_fc_gpu_{rank}.pt")
    with pytest.raises(FileNotFoundError, match=r"but not those of the ranks \[1, 2\]: copy"):
        read_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file: pass those that hold"):
        read_rows(tmp_path / "nothing.pt")
    path = tmp_path / "bad.pt"
    for content in (pickle.dumps(Malicious()), b"", b"no tensors"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
            read_rows(path)
    torch.save({"weight": Malicious()}, path)
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        read_rows(path)
    torch.save({"a.weight": ROWS, "b.weight": ROWS}, path)
    with pytest.raises(
        ValueError, match=r"got a\.weight \[11, 4\], b\.weight \[11, 4\]: pass name="
    ):
        read_rows(path)
    assert torch.equal(read_rows(path, name="b.weight")[0], ROWS)
    torch.save(ROWS[:, :3], path)
    with pytest.raises(ValueError, match=r"of one width; got .* \[11, 4\], bad.pt \[11, 3\]: pass"):
        read_rows([tmp_path / "softmax_fc_gpu_0.pt", path])
