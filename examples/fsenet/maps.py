"""Part maps of a frozen parser, computed once a picture and kept in the run's folder."""

import hashlib
import zipfile

import numpy as np
import torch
from checkpoint import whole_file
from data.faces import TrainingSet
from describe import parse_pictures
from torch import Tensor
from workplace import Workplace

from partlocal import PartLocalNet

MEAN_OF = 2000  # pictures, where not all have maps


@torch.inference_mode()
def cached_maps(
    net: PartLocalNet, images: Tensor, place: Workplace, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Return part maps `n k h w` (float16) and visibility `n k` of `images`, from a cache.

    The cache's name is a hash of the parser's weights, of how its logits become maps, and of the
    pictures, so another parser or other pictures never meet stale maps.

    Args:
        net: whose parser is frozen.
        images: uint8 `n 3 h w`.
        place: device, precision and folder.
        batch_size: pictures a step.

    Raises:
        ValueError: the cache is damaged.
    """
    path = place.folder / f"maps-{_key(net, images)}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["maps"]), torch.from_numpy(arrays["visibility"])
        except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from None
    net.eval()
    maps, visibility = parse_pictures(net, images, place, size=batch_size)
    maps = maps.half()
    if place.rank == 0:
        with whole_file(path) as file:
            np.savez(file, maps=maps.numpy(), visibility=visibility.numpy())
    return maps.clone(), visibility.clone()


@torch.inference_mode()
def mean_maps(
    net: PartLocalNet, train: TrainingSet, cached: tuple[Tensor, Tensor] | None, place: Workplace
) -> Tensor:
    """Return the mean part maps `k h w` of the training pictures.

    Of pictures that are streamed it is that of `MEAN_OF`, spread evenly over the set.

    Args:
        net: whose parser is frozen.
        train: the pictures.
        cached: their maps, if they are held in memory.
        place: device and precision.
    """
    if cached is not None:
        return cached[0].float().mean(0)
    net.eval()
    data = train.dataset
    count = len(data)  # type: ignore[arg-type]
    chosen = np.linspace(0, count - 1, min(count, MEAN_OF)).astype(int).tolist()
    return parse_pictures(net, torch.stack([data[index][0] for index in chosen]), place)[0].mean(0)


def _key(net: PartLocalNet, images: Tensor) -> str:
    digest = hashlib.sha256(repr((net.parts, net.part_maps)).encode())
    for name, tensor in sorted(net.parser.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy().data)
    return digest.hexdigest()[:16]
