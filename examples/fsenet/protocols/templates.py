"""Sets of pictures of one person, described by one vector each, as IJB's protocols count them."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Shaped

BLOCK = 2**16  # faces, or pairs, that are worked on at once


def template_vectors(
    features: Shaped[np.ndarray, "n d"],
    templates: Int[np.ndarray, " n"],
    media: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"] | None = None,
    unit: bool = False,
) -> tuple[Int[np.ndarray, " t"], Float[np.ndarray, "t d"]]:
    """Return all templates in ascending order, and the unit vector of each.

    The vectors of one medium (a still picture, or the frames of a video) are averaged, the media of
    a template added, and the sum brought to length 1. Media keep their lengths: a vector that is
    long, or has a large weight, counts for more.

    >>> features = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> ids, vectors = template_vectors(features, np.array([7, 7, 7]), np.array([1, 2, 2]))
    >>> ids, vectors.round(3)
    (array([7]), array([[0.832, 0.555]], dtype=float32))

    Args:
        features: one row a face; may be memory-mapped, and half precision.
        templates: of each face.
        media: of each face; the same number in two templates is two media.
        weights: each face counts with, such as the detector's score; None is 1.
        unit: bring every feature to length 1 first.

    Raises:
        ValueError: lengths differ, a feature is not finite, or a template comes to 0.
    """
    if not len(features) == len(templates) == len(media):
        raise ValueError(
            f"features, templates and media must have a row a face; got {len(features)}, "
            f"{len(templates)} and {len(media)}"
        )
    order = np.lexsort((media, templates))
    ids, rows = np.unique(templates, return_inverse=True)
    totals = np.zeros((len(ids), features.shape[1]), dtype=np.float32)
    for some in _media(order, templates, media):
        block = unit_vectors(features, some) if unit else _finite(features, some)
        if weights is not None:
            block *= weights[some, None]
        begins = _begins(templates[some], media[some])
        sizes = np.diff(np.append(begins, len(some)))
        means = np.add.reduceat(block, begins, 0) / sizes[:, None]
        np.add.at(totals, rows[some[begins]], means)
    lengths = np.linalg.norm(totals, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"template {ids[int(np.argmin(lengths))]} has a vector of zero")
    return ids, totals / lengths


def unit_vectors(
    features: Shaped[np.ndarray, "n d"], rows: Int[np.ndarray, " r"]
) -> Float[np.ndarray, "r d"]:
    """Return some rows, brought to length 1.

    Raises:
        ValueError: one is not finite.
    """
    vectors = _finite(features, rows)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def pair_scores(
    vectors: Float[np.ndarray, "t d"], first: Int[np.ndarray, " p"], second: Int[np.ndarray, " p"]
) -> Float[np.ndarray, " p"]:
    """Return the product of rows `first` and `second`, some at a time."""
    scores = np.empty(len(first), dtype=np.float32)
    for begin in range(0, len(first), BLOCK):
        some = slice(begin, begin + BLOCK)
        scores[some] = np.einsum("pd,pd->p", vectors[first[some]], vectors[second[some]])
    return scores


def template_subjects(
    templates: Int[np.ndarray, " n"], subjects: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """Return all templates in ascending order, and whom each shows.

    >>> template_subjects(np.array([7, 3, 7]), np.array([1, 2, 1]))
    (array([3, 7]), array([2, 1]))

    Args:
        templates: of each face.
        subjects: whom it shows.

    Raises:
        ValueError: a template shows two people.
    """
    ids, where, index = np.unique(templates, return_index=True, return_inverse=True)
    if (other := subjects != subjects[where][index]).any():
        raise ValueError(f"two subjects in template {ids[index[np.argmax(other)]]}")
    return ids, subjects[where]


def _finite(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    vectors = np.asarray(features[rows], dtype=np.float32)
    if not np.isfinite(vectors).all():
        bad = int(rows[np.argmin(np.isfinite(vectors).all(1))])
        raise ValueError(f"features must be finite; row {bad} is not")
    return vectors


def _begins(templates: np.ndarray, media: np.ndarray) -> np.ndarray:
    """Return where, in sorted order, each medium begins."""
    changed = (templates[1:] != templates[:-1]) | (media[1:] != media[:-1])
    return np.concatenate([[0], np.flatnonzero(changed) + 1])


def _media(order: np.ndarray, templates: np.ndarray, media: np.ndarray) -> Iterator[np.ndarray]:
    """Yield faces in order, about `BLOCK` at a time, without dividing a medium."""
    begins = _begins(templates[order], media[order])
    starts = np.searchsorted(begins, np.arange(0, len(order), BLOCK))
    cuts = begins[starts[starts < len(begins)]]  # the last medium may reach over several blocks
    for begin, end in zip(cuts, [*cuts[1:], len(order)], strict=True):
        if end > begin:
            yield order[begin:end]
