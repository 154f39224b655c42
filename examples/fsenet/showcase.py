"""A few drawn faces with everything that the report shows of them."""

import numpy as np
import torch
from data.faces import DrawnFaces
from score_parser import predict_labels
from workplace import Workplace

from partlocal import PartLocalNet


@torch.inference_mode()
def show_faces(
    net: PartLocalNet, faces: DrawnFaces, place: Workplace, people: int = 6, samples: int = 2
) -> dict[str, np.ndarray]:
    """Return pictures, maps, label maps, part vectors and both halves, ready for `np.savez`.

    Args:
        net: trained.
        faces: drawn ones; pictures of real people never enter a report.
        place: device and precision.
        people: how many to show.
        samples: pictures of each.
    """
    net.eval()
    rows = torch.cat([torch.where(faces.identities == i)[0][:samples] for i in range(people)])
    images = faces.images[rows]
    with place.autocast():
        parts = net.forward_parts(images.to(place.device))
    return {
        "images": images.permute(0, 2, 3, 1).numpy(),
        "maps": parts.maps.half().cpu().numpy(),
        "labels": predict_labels(net.parser, images, place),
        "identity": faces.identities[rows].numpy(),
        "part_names": np.array(net.parts),
        "parts": parts.parts.float().cpu().numpy(),
        "global": parts.global_vector.float().cpu().numpy(),
        "local": parts.local_vector.float().cpu().numpy(),
        "visibility": parts.visibility.float().cpu().numpy(),
    }
