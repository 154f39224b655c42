"""YouTube Faces: 5,000 pairs of videos in ten folds.

A video is the mean of its frames' unit vectors, brought to length 1 again; or two videos are
compared by all pairs of their frames (`FramePairs`). The list is `splits.txt`: a line of titles,
then `split, pair, Name/video, Name/video, same` with commas, and possibly more between; the last
field says whether both show one person. Corrected lists are about: the hash says which was read.

Source: Wolf, Hassner, Maoz, CVPR 2011.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from partlocal.evaluation.search import Vectors
from protocols.lists import ListFiles, listing, read_list
from protocols.rates import as_insightface, fold_rates
from protocols.templates import pair_scores, template_vectors, unit_vectors

FramePairs = Literal["none", "min", "mean", "max"]  # of their squared distances


@dataclass(frozen=True, eq=False)
class YtfProtocol:
    """The pairs of videos.

    Args:
        first: video of each pair, as `Name/0`.
        second: the other.
        same: whether both show one person.
        fold: of each pair, from 0.
        hashes: sha256 of the list, by its place.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    same: Bool[np.ndarray, " p"]
    fold: Int[np.ndarray, " p"]
    hashes: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "YtfProtocol":
        """Read `splits.txt`, or the one in a folder, zip or tar, wherever it lies there.

        Raises:
            FileNotFoundError: there is no list.
            ValueError: a line is not as it should be; the message names it.
        """
        path = Path(path)
        if path.exists() and not path.is_dir() and path.suffix == ".txt":
            data = read_list(path)
            text = data.decode("utf-8", errors="replace")
            hashes = {path.name: hashlib.sha256(data).hexdigest()}
        else:
            lists = ListFiles(path)
            text, hashes = lists.text("splits.txt"), lists.hashes
            path = path / lists.place("splits.txt")  # as errors call it
        titles, *lines = text.splitlines() or [""]
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
        return cls(first, second, np.array(same), fold, hashes)

    @property
    def videos(self) -> frozenset[str]:
        """All videos of the pairs."""
        return frozenset(self.first + self.second)

    def check_videos(self, names: Sequence[str]) -> None:
        """Refuse frames that lack those of a video.

        Args:
            names: of the frames.

        Raises:
            ValueError: there are none of some videos; all are named.
        """
        if missing := sorted(self.videos - set(map(video_of, names))):
            example = f" (there are such as {names[0]!r})" if names else ""
            raise ValueError(
                f"{len(missing)} of the list's {len(self.videos)} videos have no frame, which is "
                f"named Name/video/frame{example}: {listing(missing)}"
            )

    def evaluate(
        self, names: Sequence[str], features: Vectors, frame_pairs: FramePairs = "none"
    ) -> dict[str, Any]:
        """Return the accuracy over the folds, and other rates.

        Args:
            names: of the frames, `Name/video/frame.jpg`.
            features: one row a frame.
            frame_pairs: two videos are as far apart as the nearest pair of their frames (`min`),
                the farthest, or the mean of all; `none` compares the videos' mean vectors.

        Raises:
            ValueError: videos of the pairs have no frames (all are named), or see
                `template_vectors`.
        """
        videos, video = np.unique([video_of(name) for name in names], return_inverse=True)
        self.check_videos(names)
        row = {name: number for number, name in enumerate(videos.tolist())}
        a, b = (np.array([row[name] for name in side]) for side in (self.first, self.second))
        if frame_pairs == "none":
            _, vectors = template_vectors(features, video, np.zeros(len(video), int), unit=True)
            scores = pair_scores(vectors, a, b)
        else:
            scores = _frame_scores(features, video, a, b, frame_pairs)
        found, _ = fold_rates(scores, self.same, self.fold)
        return found | {"insightface": as_insightface(scores, self.same, self.fold)}


def video_of(name: str) -> str:
    """Return the video that a frame belongs to.

    >>> video_of("Abel_Pacheco/0/17.jpg")
    'Abel_Pacheco/0'
    """
    return name.rpartition("/")[0]


def _frame_scores(
    features: Vectors,
    video: Int[np.ndarray, " n"],
    first: Int[np.ndarray, " p"],
    second: Int[np.ndarray, " p"],
    how: FramePairs,
) -> Float[np.ndarray, " p"]:
    """Return cosines of two frames: a squared distance of unit vectors is 2 - 2 cosine."""
    order = np.argsort(video, kind="stable")
    frames = np.split(order, np.flatnonzero(np.diff(video[order])) + 1)
    reduce = {"min": np.max, "mean": np.mean, "max": np.min}[how]
    scores = np.empty(len(first), np.float32)
    for pair, sides in enumerate(zip(first, second, strict=True)):
        a, b = (unit_vectors(features, frames[side]) for side in sides)
        scores[pair] = reduce(a @ b.T)
    return scores
