"""Saving and loading without pickle: the path through the hub, and everything that is refused."""

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.hub_mixin
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import partlocal.hub
from partlocal import HELEN, ArcFaceHead, ParsingNet, PartLocalNet
from partlocal.hub import HubModule, check_keys, load_weights


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


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers where `somebody/head` holds `folder`, and `somebody/half` a part."""

    folder: Path

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        wrong = None
        if repository not in ("somebody/head", "somebody/half"):
            wrong = "GatedRepo" if repository == "somebody/gated" else "RepoNotFound"
        elif revision != "main":
            wrong = "RevisionNotFound"
        elif repository == "somebody/half" and name == "model.safetensors":
            wrong = "EntryNotFound"
        data = b"" if wrong else (self.folder / name).read_bytes()
        self.send_response({None: 200, "GatedRepo": 403}.get(wrong, 404))
        if wrong:
            self.send_header("X-Error-Code", wrong)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


LOAD = """
import os, sys
from partlocal import ArcFaceHead
for arguments in sys.argv[1:]:
    repository, _, revision = arguments.partition("@")
    try:
        print(ArcFaceHead.from_pretrained(repository, revision=revision or None))
    except FileNotFoundError as error:
        print(repr(str(error)))
"""


def load(cache, *repositories, **environment):
    """Load in a process of its own, for the hub's client reads the environment once."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *repositories],
        env={**os.environ, "HF_HOME": str(cache), "NO_PROXY": "*", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_hubs_client(tmp_path):
    """Its real client against a server that answers as the hub does."""
    (tmp_path / "repository").mkdir()
    ArcFaceHead(4, 3).save_pretrained(tmp_path / "repository")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "repository"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        names = ["somebody/head", "somebody/head@v9", "somebody/gated", "somebody/half", "runs/net"]
        lines = load(tmp_path / "cache", *names, HF_ENDPOINT=endpoint)
        server.shutdown()
    assert lines == [
        str(ArcFaceHead(4, 3)),
        "'somebody/head is no folder here, and somebody/head on the hub has no such revision'",
        "'somebody/gated is no folder here, and somebody/gated on the hub is gated: accept its "
        "terms there and log in'",
        "'somebody/half is no folder here, and somebody/half on the hub holds no "
        "model.safetensors: pass one that push_to_hub wrote'",
        "'runs/net is no folder here, and the hub has no repository runs/net, or a private one: "
        "check the name, or pass token='",
    ]
    # without a network: what was downloaded before, and one line about what was not
    assert load(tmp_path / "cache", "somebody/head", "runs/net", HF_HUB_OFFLINE="1") == [
        str(ArcFaceHead(4, 3)),
        '"runs/net is no folder here, and config.json of the repository runs/net is not in the '
        "hub's cache and could not be downloaded: check the path, or the network\"",
    ]


def test_a_missing_folder(tmp_path, monkeypatch):
    """No name that cannot be a repository's is sent anywhere, and each is refused in one line."""
    for name in ("missing/local/folder", "./missing", "/no/where", "a b", ""):
        with pytest.raises(
            FileNotFoundError,
            match="is no folder here, and no owner/name of a repository on the hub either: pass",
        ) as caught:
            Scale.from_pretrained(name)
        assert str(caught.value).startswith(f"{name} is")
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    for wrong in (Path("owner/name"), tmp_path / "none", str(tmp_path / "file")):
        with pytest.raises(FileNotFoundError, match=r"is no folder: pass one that save_pretrai"):
            Scale.from_pretrained(wrong)

    def broken(*_, **__):
        raise ValueError("Force download failed\ndue to the above error.")

    monkeypatch.setattr(partlocal.hub, "hf_hub_download", broken)
    with pytest.raises(
        FileNotFoundError,
        match=r"^owner/name is no folder here, and config.json of the repository owner/name could "
        r"not be downloaded \(ValueError: Force download failed\)$",
    ):
        Scale.from_pretrained("owner/name")


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


def test_tied_weights_are_saved_under_both_names(tmp_path):
    class Tied(Scale):
        def __init__(self, width=2):
            super().__init__(width)
            self.again = self.w

    module = Tied(4)
    module.save_pretrained(tmp_path)
    with torch.no_grad():
        module.w.zero_()
    loaded = Tied.from_pretrained(tmp_path)
    assert loaded.again is loaded.w
    assert loaded.w.tolist() == [0, 1, 2, 3]


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
        ValueError, match=r"holds Scale, not Other: load it with Scale.from_pretrained"
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
    ("name", "value", "message"),
    [
        ("w", torch.arange(3), r"w must be torch\.float32; got torch\.int64: load what was saved"),
        ("w", torch.ones(3) + 1j, r"w must be torch\.float32; got torch\.complex64"),
        (
            "norm.num_batches_tracked",
            torch.tensor(1.5),
            r"_tracked must be torch\.int64; got .*t32",
        ),
        ("w", torch.tensor([0.0, torch.nan, 1.0]), r"not finite in torch\.float32: w: load a file"),
        ("norm.running_var", torch.tensor([1.0, 1.0, torch.inf]), "not finite .*norm.running_var"),
        ("w", torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64), "not finite in torch.float32"),
    ],
)
def test_weights_of_another_kind(tmp_path, name, value, message):
    module = filled()
    before = {key: t.clone() for key, t in module.state_dict().items()}
    save_file({**before, name: value}, tmp_path / "weights")
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(module, tmp_path / "weights")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())
    save_file({**before, "w": before["w"].half()}, tmp_path / "weights")  # another precision
    load_weights(module, tmp_path / "weights")
    assert torch.equal(module.w, before["w"].half().float())


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path, error, why in (
        (file, FileExistsError, "File exists"),
        (file / "net", NotADirectoryError, "Not a directory"),
    ):
        with pytest.raises(error) as caught:
            filled().save_pretrained(path)
        assert str(caught.value) == (
            f"save_directory must lead to a folder that can be written; got {path} "
            f"({why}): choose another, or make room there"
        )


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"class": "Scale"}', '{"class": "Scale", "arguments": 3}', "{", "\x80"]
)
def test_a_damaged_config(tmp_path, text):
    filled().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json is damaged, or no config of a Scale"):
        Scale.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"width": 3, "colour": 1}, r"TypeError: .* unexpected keyword argument 'colour'"),
        ({"width": "3"}, "TypeError: "),
        ({"breadth": 3}, r"TypeError: .* unexpected keyword argument 'breadth'"),
        ({"width": []}, "TypeError: "),
    ],
)
def test_a_config_of_another_version(tmp_path, arguments, reason):
    filled().save_pretrained(tmp_path)
    config = {"class": "Scale", "arguments": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"config.json describes no Scale that can be built \({reason}.*\): load"
    ) as caught:
        Scale.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_without_what_it_must_hold(tmp_path):
    ArcFaceHead(4, 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["arguments"]["margin"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"ArcFaceHead must hold in_features, .*; it lacks margin\)"
    ):
        ArcFaceHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.pop("local_weight"),
            "the config of PartLocalNet must hold .* it lacks local_",
        ),
        (lambda c: c.update(tap=1), "the config of PartLocalNet .* has the unknown tap"),
        (lambda c: c["options"].update(colour=1), "the config of LocalOptions .* unknown colour"),
        (lambda c: c["backbone"].pop("tap"), "the config of Backbone must hold .*, tap; got args"),
        (lambda c: c["parser"].update(height=1), "the config of ParsingNet .* unknown height"),
        (lambda c: c["parser"]["labels"].pop("side"), "KeyError: 'side'"),
        (lambda c: c.update(options=None), "LocalOptions must hold values by name; got None"),
        (lambda c: c.update(parts=["ear"]), "ear"),
        (lambda c: c["backbone"].update(model="hf-hub:a/b"), "a model of timm's registry"),
    ],
)
def test_a_changed_config_of_a_network(tmp_path, change, message):
    parser = ParsingNet(HELEN, width=4, num_stacks=1, grid=16, input_size=32)
    net = PartLocalNet("resnet10t", parser, ("nose",), image_size=64)
    path = tmp_path / "config.json"
    net.save_pretrained(tmp_path)
    config = json.loads(path.read_text())
    change(config["arguments"])
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"config.json describes no PartLocalNet that can be built \(.*{message}"
    ) as caught:
        PartLocalNet.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the config of X must hold a, b and may hold c; it lacks a, b"),
        (
            {"a": 1, "b": 2, "d": 3, "e": 4},
            "must hold a, b and may hold c; it has the unknown d, e",
        ),
        ({"a": 1, "c": 1, "d": 1}, "it lacks b and has the unknown d"),
    ],
)
def test_check_keys(config, message):
    check_keys("X", {"a": None, "b": None}, ["a", "b"], ["c"])
    check_keys("X", {"a": None, "b": None, "c": None}, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match=f"{message}$"):
        check_keys("X", config, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"the config of X may hold c; it has the unknown z$"):
        check_keys("X", {"z": 1}, [], ["c"])


def test_a_subclass_must_say_how_it_was_built(tmp_path):
    class Silent(HubModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Silent does not define config\(\)"):
        Silent().save_pretrained(tmp_path / "silent")
    assert not (tmp_path / "silent").exists()
    with pytest.raises(NotImplementedError, match=r"Silent does not define from_config\(\)"):
        Silent.from_config({})


@pytest.mark.skipif(os.name != "posix", reason="permissions are another thing there")
def test_saved_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors leaves files that their owner alone may read."""
    mask = os.umask(0o022)
    try:
        Scale(3).save_pretrained(tmp_path)
        parser = ParsingNet(HELEN, width=8, num_stacks=1, grid=32)
        parser.save_compact(tmp_path / "small.safetensors")
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    names = ("config.json", "model.safetensors", "README.md", "small.safetensors", "small.json")
    assert modes == dict.fromkeys(names, 0o644)
    assert "Scale.from_pretrained(" in (tmp_path / "README.md").read_text()
