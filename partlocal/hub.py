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
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        config = {"class": type(self).__name__, "arguments": self.config()}
        with tempfile.TemporaryDirectory(dir=save_directory) as scratch:
            save_file(tensors, Path(scratch) / WEIGHTS)
            (Path(scratch) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(scratch) / name, save_directory / name)

    @classmethod
    def _from_pretrained(
        cls: type[T],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **kwargs: Any,
    ) -> T:
        if kwargs:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes no {sorted(kwargs)}: "
                f"what the module was built with stands in its {CONFIG}"
            )

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

        with open(find(CONFIG), encoding="utf-8") as file:
            config = json.load(file)
        if config.get("class") != cls.__name__:
            raise ValueError(
                f"{model_id} holds a {config.get('class')}, not a {cls.__name__}: "
                f"load it with {config.get('class')}.from_pretrained"
            )
        module = cls.from_config(config["arguments"])
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
