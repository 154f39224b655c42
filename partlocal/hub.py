"""Save and load without pickle: one config.json and one model.safetensors, loaded strictly."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelHubMixin, hf_hub_download
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
        """Write config.json and model.safetensors; nothing is half written when it fails."""
        self.config()  # before the folder is touched: a module that cannot be rebuilt refuses here
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub") and kwargs.get("repo_id") is None:
            kwargs["repo_id"] = folder.name
        # the mixin begins by deleting the config.json that is there: let it do so elsewhere
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            result = super().save_pretrained(scratch, **kwargs)
            for path in Path(scratch).iterdir():
                if path.name in (WEIGHTS, CONFIG) or not (folder / path.name).exists():
                    os.replace(path, folder / path.name)  # a README.md of the user's stays
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        config = {"class": type(self).__name__, "arguments": self.config()}
        save_file(tensors, save_directory / WEIGHTS)
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

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

        Raises:
            TypeError: an argument is none of the above; the config has what the module needs.
            FileNotFoundError: a folder without one of both files.
            ValueError: a file is damaged, or of another class or architecture.
        """
        if kwargs:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes no {sorted(kwargs)}: "
                f"what the module was built with stands in its {CONFIG}"
            )
        model_id = str(pretrained_model_name_or_path)

        def find(name: str) -> str:
            if os.path.isdir(model_id):
                path = os.path.join(model_id, name)
                if not os.path.isfile(path):
                    raise FileNotFoundError(
                        f"{model_id} holds no {name}: pass a folder that save_pretrained wrote"
                    )
                return path
            return hf_hub_download(
                model_id,
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )

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
                f"{model_id} holds a {built_as}, not a {cls.__name__}: "
                f"load it with {built_as}.from_pretrained"
            )
        module = cls.from_config(arguments)
        load_weights(module, find(WEIGHTS))
        return module.eval()


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Copy every tensor of a safetensors file into `module`, or refuse.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not those of `module`.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit this {type(module).__name__}; it was saved from another "
            f"architecture: {str(error).splitlines()[-1].strip()}"
        ) from None
