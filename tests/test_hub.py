"""Saving and loading without pickle: the path through the hub, and everything that is refused."""

import json
import os
import pickle

import huggingface_hub.hub_mixin
import pytest
import torch
from torch import nn

import partlocal.hub
from partlocal.hub import HubModule, load_weights


class Scale(HubModule):
    """y = w x, with a buffer that eval mode leaves alone."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(float(width)))
        self.norm = nn.BatchNorm1d(width)

    def config(self):
        return {"width": len(self.w)}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class Other(Scale):
    """The same tensors under another name."""


def filled(width=3):
    module = Scale(width)
    with torch.no_grad():
        module.w.add_(0.5)
    module.norm(torch.rand(9, width))
    return module


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_example(tmp_path):
    module = filled()
    module.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {"config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    assert all(p.suffix in (".json", ".safetensors", ".md") for p in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config == {"class": "Scale", "arguments": {"width": 3}}
    loaded = Scale.from_pretrained(folder)
    assert same(loaded, module)
    assert not loaded.training
    assert same(Scale.from_pretrained(str(folder)), module)
    (folder / "README.md").write_text("mine")
    filled(5).save_pretrained(folder)  # over the old one
    assert len(Scale.from_pretrained(folder).w) == 5
    assert (folder / "README.md").read_text() == "mine"
    assert not list(folder.glob(".*"))


def test_the_hub(tmp_path, monkeypatch):
    """Both files come through the hub's downloader, with every argument that says which."""
    module = filled()
    module.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **how):
        asked.append((repo_id, filename, how))
        return str(tmp_path / filename)

    monkeypatch.setattr(partlocal.hub, "hf_hub_download", download)
    loaded = Scale.from_pretrained(
        "somebody/scale",
        revision="v1",
        cache_dir=tmp_path / "cache",
        force_download=True,
        local_files_only=True,
        token="secret",
    )
    assert same(loaded, module)
    assert [name for _, name, _ in asked] == ["config.json", "model.safetensors"]
    for repo, _, how in asked:
        assert repo == "somebody/scale"
        assert how["revision"] == "v1"
        assert how["cache_dir"] == tmp_path / "cache"
        assert how["force_download"] is how["local_files_only"] is True
        assert how["token"] == "secret"


def test_push(tmp_path, monkeypatch):
    """What is uploaded is what `save_pretrained` writes, and no pickle."""
    uploaded = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **_):
            for name in os.listdir(folder_path):
                with open(os.path.join(folder_path, name), "rb") as file:
                    uploaded[name] = file.read()
            return "url"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    module = filled()
    module.push_to_hub("somebody/scale")
    assert {"config.json", "model.safetensors"} <= set(uploaded)
    assert not [name for name in uploaded if name.endswith((".bin", ".pt", ".pkl"))]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(uploaded[name])
    assert same(Scale.from_pretrained(tmp_path), module)


def test_views_and_layouts_are_saved_as_their_values(tmp_path):
    """Tensors that lie strided in memory are written as they read."""
    module = filled(4)
    module.w = nn.Parameter(torch.arange(8.0)[::2])
    module.save_pretrained(tmp_path)
    assert Scale.from_pretrained(tmp_path).w.tolist() == [0, 2, 4, 6]


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    filled(3).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partlocal.hub, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        filled(4).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_errors(tmp_path):
    filled().save_pretrained(tmp_path)
    with pytest.raises(
        TypeError,
        match=r"Scale.from_pretrained takes no \['width'\]: what the module was built with stands "
        "in its config.json",
    ):
        Scale.from_pretrained(tmp_path, width=7)

    with pytest.raises(
        ValueError, match=r"holds a Scale, not a Other: load it with Scale.from_pretrained"
    ):
        Other.from_pretrained(tmp_path)

    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).rename(tmp_path / "away")
        message = f"holds no {name}: pass a folder that save_pretrained wrote"
        with pytest.raises(FileNotFoundError, match=message):
            Scale.from_pretrained(tmp_path)
        (tmp_path / "away").rename(tmp_path / name)

    weights = (tmp_path / "model.safetensors").read_bytes()
    pickled = pickle.dumps(filled().state_dict())
    for data in (b"", weights[:-1], weights[:40], pickled):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            Scale.from_pretrained(tmp_path)

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(3))

    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="does not fit this Renamed; it was saved from another"):
        load_weights(Renamed(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"size mismatch for norm.running_var") as caught:
        load_weights(Scale(9), tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"class": "Scale"}', '{"class": "Scale", "arguments": 3}', "{", "\x80"]
)
def test_a_damaged_config(tmp_path, text):
    filled().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json is damaged, or no config of a Scale"):
        Scale.from_pretrained(tmp_path)


def test_a_subclass_must_say_how_it_was_built(tmp_path):
    class Silent(HubModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Silent does not define config\(\)"):
        Silent().save_pretrained(tmp_path / "silent")
    assert not (tmp_path / "silent").exists()
    with pytest.raises(NotImplementedError, match=r"Silent does not define from_config\(\)"):
        Silent.from_config({})
