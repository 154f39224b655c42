"""YouTube Faces: 5,000 pairs of videos in ten folds.

A video is the mean of its frames' unit vectors, brought to length 1 again. The list is
`splits.txt`: a line of titles, then `split, pair, Name/video, Name/video, same` with commas, and
possibly more between; the last field says whether both show one person. Corrected lists are
about: the hash says which one was read.

Source: Wolf, Hassner, Maoz, CVPR 2011.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data.archives import Source
from jaxtyping import Bool, Float, Int

from partlocal.evaluation import auc, tar_at_far, ten_fold_accuracy
from protocols.pairs import as_insightface
from protocols.templates import pair_scores, template_vectors


@dataclass(frozen=True, eq=False)
class YtfProtocol:
    """The pairs of videos.

    Args:
        first: video of each pair, as `Name/0`.
        second: the other.
        same: whether both show one person.
        fold: of each pair, from 0.
        sha256: of the list.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    same: Bool[np.ndarray, " p"]
    fold: Int[np.ndarray, " p"]
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> "YtfProtocol":
        """Read `splits.txt`, or the one at the top of a folder, zip or tar.

        Raises:
            FileNotFoundError: there is no list.
            ValueError: a line is not as it should be; the message names it.
        """
        path = Path(path)
        if path.is_file() and path.suffix == ".txt":
            data = path.read_bytes()
        else:
            source = Source(path)
            if "splits.txt" not in source:
                raise FileNotFoundError(f"{path} holds no splits.txt at its top")
            data = source.read("splits.txt")
        titles, *lines = data.decode("utf-8", errors="replace").splitlines() or [""]
        if not titles.lstrip('\ufeff" ').lower().startswith("split"):
            raise ValueError(
                f"{path} must begin with a line of titles, 'split number, pair number, ...'; got "
                f"{titles[:80]!r}"
            )
        rows = []
        for number, line in enumerate(lines, 2):
            fields = [field.strip() for field in line.split(",")]
            if not line.strip():
                continue
            if len(fields) < 5 or not fields[0].isdigit() or fields[-1] not in ("0", "1"):
                raise ValueError(
                    f"{path} line {number} should be 'split, pair, video, video, 0 or 1'; got "
                    f"{line[:80]!r}"
                )
            rows.append((fields[2], fields[3], fields[-1] == "1", int(fields[0])))
        if not rows:
            raise ValueError(f"{path} holds no pairs")
        first, second, same, split = zip(*rows, strict=True)
        fold = np.unique(split, return_inverse=True)[1]
        return cls(first, second, np.array(same), fold, hashlib.sha256(data).hexdigest())

    def evaluate(
        self, names: Sequence[str], features: Float[np.ndarray, "n d"]
    ) -> dict[str, float | dict[str, float]]:
        """Return the accuracy over the folds, and other rates.

        Args:
            names: of the frames, `Name/video/frame.jpg`.
            features: one row a frame.

        Raises:
            ValueError: videos of the pairs have no frames (all are counted), or see
                `template_vectors`.
        """
        videos, video = np.unique([name.rpartition("/")[0] for name in names], return_inverse=True)
        row = {name: number for number, name in enumerate(videos.tolist())}
        if missing := sorted({*self.first, *self.second} - set(row)):
            raise ValueError(
                f"{len(missing)} of the list's videos have no frame, first {missing[:5]}: frames "
                "are named Name/video/frame"
            )
        _, vectors = template_vectors(features, video, np.zeros(len(video), int), unit=True)
        a, b = (np.array([row[name] for name in side]) for side in (self.first, self.second))
        scores = pair_scores(vectors, a, b)
        folds = ten_fold_accuracy(scores, self.same, self.fold)
        found: dict[str, Any] = {
            "accuracy": folds.mean,
            "standard_error_over_folds": folds.standard_error,
            "insightface": as_insightface(scores, self.same, self.fold),
            "auc": auc(scores, self.same),
            "tar_at_far_0.001": float(tar_at_far(scores, self.same, 0.001)),
        }
        return found
