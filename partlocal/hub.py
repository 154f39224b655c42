"""Save and load without pickle: one config.json and one model.safetensors, loaded strictly."""

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

T = TypeVar("T", bound="HubModule")


class HubModule(nn.Module, ModelHubMixin):
    """A module that `save_pretrained`, `from_pretrained` and `push_to_hub` can carry.

    A subclass says how it was built with `config()` and rebuilds itself with `from_config()`.
    Loading is strict and never executes code: no pickle is read, from a folder or from the hub.
    """

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this module, as JSON holds them."""
        raise NotImplementedError(f"{type(self).__name__} does not define config()")

    @classmethod
    def from_config(cls: type[T], config: dict[str, Any]) -> T:
        """Build a module with fresh weights from what `config()` returned."""
        raise NotImplementedError(f"{cls.__name__} does not define from_config()")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json and model.safetensors; nothing is half written when it fails.

        A README.md that says how they are loaded is written too, where there is none.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self.config()  # before the folder is touched: a module that cannot be rebuilt refuses here
        folder = Path(save_directory)
        if kwargs.get("push_to_hub") and kwargs.get("repo_id") is None:
            kwargs["repo_id"] = folder.name
        # the mixin begins by deleting the config.json that is there: let it do so elsewhere
        with scratch_folder(folder, "save_directory") as scratch:
            result = super().save_pretrained(scratch, **kwargs)
            for path in Path(scratch).iterdir():
                if path.name in (WEIGHTS, CONFIG) or not (folder / path.name).exists():
                    os.replace(path, folder / path.name)  # a README.md of the user's stays
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        # cloned, because safetensors refuses tensors that share memory, as tied weights do
        tensors = {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, t in self.state_dict().items()
        }
        config = {"class": type(self).__name__, "arguments": self.config()}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(tensors, save_directory / WEIGHTS)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the README.md of the folder: how the module in it is loaded."""
        name, module = type(self).__name__, type(self).__module__
        source = "partlocal" if module.startswith("partlocal.") else module
        return ModelCard(
            f"---\nlibrary_name: partlocal\n---\n\n# {name}\n\n```python\n"
            f"from {source} import {name}\n\n"
            f'module = {name}.from_pretrained("this folder, or owner/name on the hub")\n```\n',
            ignore_metadata_errors=True,
        )

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> T:
        """Load what `save_pretrained` wrote, from a folder or the hub, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder, else a repository of the hub, `owner/name`;
                a `Path` is always a folder.
            revision: branch, tag or commit of the repository.
            cache_dir: where the hub's client keeps what it downloads.
            force_download: download although the cache holds the files.
            local_files_only: take the files from the cache, without a network.
            token: for a private repository.

        Raises:
            TypeError: an argument is none of the above; the config has what the module needs.
            FileNotFoundError: neither folder nor repository, or one without one of both files.
            ValueError: a file is damaged, or of another class or architecture.
        """
        if kwargs:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes no {sorted(kwargs)}: "
                f"what the module was built with stands in its {CONFIG}"
            )
        source = str(pretrained_model_name_or_path)

        def find(name: str) -> str:
            if os.path.isdir(source):
                path = os.path.join(source, name)
                if not os.path.isfile(path):
                    raise FileNotFoundError(
                        f"{source} holds no {name}: pass a folder that save_pretrained wrote"
                    )
                return path
            if isinstance(pretrained_model_name_or_path, Path) or os.path.exists(source):
                raise FileNotFoundError(
                    f"{source} is no folder: pass one that save_pretrained wrote"
                )
            try:
                return hf_hub_download(
                    source,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"{source} is no folder here, and {_not_downloaded(error, source, name)}"
                ) from None

        path = find(CONFIG)
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            built_as, arguments = config["class"], dict(config["arguments"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, or no config of a {cls.__name__} ({error!r}): "
                "load what save_pretrained wrote"
            ) from None
        if built_as != cls.__name__:
            raise ValueError(
                f"{source} holds {built_as}, not {cls.__name__}: "
                f"load it with {built_as}.from_pretrained"
            )
        module = cls._build(path, arguments)
        load_weights(module, find(WEIGHTS))
        return module.eval()

    @classmethod
    def _build(cls: type[T], path: str | Path, arguments: dict[str, Any]) -> T:
        """Call `from_config` on what was read from `path`, which anybody may have written."""
        try:
            return cls.from_config(arguments)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{path} describes no {cls.__name__} that can be built ({reason}): load what "
                "was saved as it was saved, with a partlocal at least as new"
            ) from error


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as far as the umask lets them.

    Left alone, `save_file` makes one for its owner only.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def scratch_folder(folder: Path, name: str) -> "tempfile.TemporaryDirectory[str]":
    """Make `folder` if it is not there, and in it one that is gone after its `with`.

    Raises:
        OSError: it cannot be made or written; of the kind that the system raised.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder, prefix=".")
    except OSError as error:
        raise type(error)(
            f"{name} must lead to a folder that can be written; got {folder} ({error.strerror}): "
            "choose another, or make room there"
        ) from None


def check_keys(
    owner: str, config: object, required: Collection[str], optional: Collection[str] = ()
) -> None:
    """Refuse a configuration that lacks a key, which a default would replace, or has one more.

    >>> check_keys("Scale", {"width": 3, "colour": "red"}, required=["width", "norm"])
    Traceback (most recent call last):
    ValueError: the config of Scale must hold width, norm; it lacks norm and has the unknown colour

    Raises:
        ValueError: a required key is missing, a key is neither required nor optional, or there
            are no keys.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"the config of {owner} must hold values by name; got {config!r}")
    lacks = [key for key in required if key not in config]
    unknown = [str(key) for key in config if key not in required and key not in optional]
    if lacks or unknown:
        wrong = [f"lacks {', '.join(lacks)}"] if lacks else []
        wrong += [f"has the unknown {', '.join(unknown)}"] if unknown else []
        expected = f"must hold {', '.join(required)}" if required else ""
        may = f"may hold {', '.join(optional)}" if optional else ""
        raise ValueError(
            f"the config of {owner} {' and '.join(filter(None, [expected, may]))}; "
            f"it {' and '.join(wrong)}"
        )


def _not_downloaded(error: Exception, repository: str, name: str) -> str:
    """Say in one line why the hub's client did not return a file; its own texts have several."""
    if isinstance(error, HFValidationError):
        return "no owner/name of a repository on the hub either: pass one of both"
    why = {  # a class stands before those that it derives from
        GatedRepoError: f"{repository} on the hub is gated: accept its terms there and log in",
        RepositoryNotFoundError: f"the hub has no repository {repository}, or a private one: "
        "check the name, or pass token=",
        RevisionNotFoundError: f"{repository} on the hub has no such revision",
        LocalEntryNotFoundError: f"{name} of the repository {repository} is not in the hub's cache "
        "and could not be downloaded: check the path, or the network",
        EntryNotFoundError: f"{repository} on the hub holds no {name}: pass one that push_to_hub "
        "wrote",
    }
    for kind, text in why.items():
        if isinstance(error, kind):
            return text
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{name} of the repository {repository} could not be downloaded ({first})"


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Copy every tensor of a safetensors file into `module`, or refuse.

    Raises:
        ValueError: the file is damaged, its names, shapes or kinds of number are not those of
            `module`, or a weight is not finite.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    for name, own in module.state_dict().items():
        if name not in tensors:
            continue  # the strict load below names all that is missing
        found = tensors[name]
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (found, own)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{path} does not fit this {type(module).__name__}: {name} must be {own.dtype}; "
                f"got {found.dtype}: load what was saved as it was saved"
            )
        if not found.to(own.dtype).isfinite().all():
            raise ValueError(
                f"{path} holds weights that are not finite in {own.dtype}: {name}: load a file "
                "that was saved before training diverged"
            )
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit this {type(module).__name__}; it was saved from another "
            f"architecture: {str(error).splitlines()[-1].strip()}"
        ) from None
