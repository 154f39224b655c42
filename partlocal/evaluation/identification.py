"""Identification: who in the gallery is this? A score matrix in, rates out.

Every probe (a face to identify) is scored against every gallery entry (a face with a known name;
one person may have several). A tie between a mate, an entry of the probe's own person, and
somebody else counts against the mate.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped


def rank_k(
    scores: Shaped[np.ndarray, "q g"],
    gallery_ids: Shaped[np.ndarray, " g"],
    probe_ids: Shaped[np.ndarray, " q"],
    k: int | Int[np.ndarray, " r"] = 1,
) -> float | Float[np.ndarray, " r"]:
    """Return the share of probes with a mate among their k best gallery entries (closed set).

    >>> scores = np.array([[0.9, 0.1, 0.3], [0.6, 0.5, 0.2]])
    >>> rank_k(scores, np.array(["ann", "bob", "eve"]), np.array(["ann", "bob"]), k=1)
    0.5
    >>> rank_k(scores, np.array(["ann", "bob", "eve"]), np.array(["ann", "bob"]), k=2)
    1.0

    Args:
        scores: higher for more similar; `-inf` takes an entry out for this probe, such as the
            probe itself where all pictures are compared with all.
        gallery_ids: who each gallery entry is.
        probe_ids: who each probe is.
        k: one rank, or several at once.

    Raises:
        ValueError: shapes disagree, there are no probes, scores are NaN or inf, k is not from 1
            to g, or a probe has no mate (then ask `tpir_at_fpir`).
    """
    scores, mates = _check(scores, gallery_ids, probe_ids)
    ranks = np.asarray(k)
    if not np.issubdtype(ranks.dtype, np.integer) or not np.all(
        (ranks >= 1) & (ranks <= scores.shape[1])
    ):
        raise ValueError(f"k must be from 1 to the {scores.shape[1]} gallery entries; got {k}")
    mate, _, ahead = _best_mates(scores, mates)
    if lost := np.count_nonzero(mate == -np.inf):
        raise ValueError(
            f"{lost} of {len(mate)} probes have no mate in the gallery, first at index "
            f"{np.argmax(mate == -np.inf)}: leave them out, or use tpir_at_fpir for an open set"
        )
    hits = (ahead[:, None] < ranks.reshape(1, -1)).mean(0)
    return hits if ranks.ndim else float(hits[0])


def tpir_at_fpir(
    scores: Shaped[np.ndarray, "q g"],
    gallery_ids: Shaped[np.ndarray, " g"],
    probe_ids: Shaped[np.ndarray, " q"],
    fpir: float | Float[np.ndarray, " t"],
    mode: Literal["strict", "parity"] = "strict",
) -> float | Float[np.ndarray, " t"]:
    """Return how many mated probes are found where strangers raise an alarm at a given rate.

    A mated probe is found if its best mate is ahead of everybody else and above the threshold; a
    probe of a stranger raises a false alarm if any gallery entry is above it.

    >>> scores = np.array([[0.9, 0.1], [0.2, 0.5], [0.6, 0.3], [0.1, 0.4]])
    >>> gallery, probes = np.array([0, 1]), np.array([0, 1, 7, 8])
    >>> tpir_at_fpir(scores, gallery, probes, 0.1)  # no alarm: the threshold is 0.6
    0.5
    >>> tpir_at_fpir(scores, gallery, probes, 0.5)  # one of two strangers may raise one
    1.0

    Args:
        scores: higher for more similar; `-inf` takes an entry out for this probe.
        gallery_ids: who each gallery entry is.
        probe_ids: who each probe is; those whose id is not in the gallery are the strangers.
        fpir: false positive identification rates in (0, 1], one or several.
        mode: `"strict"` puts the threshold at the score of the first stranger who may not pass,
            so that the rate is at most `fpir`. `"parity"` is insightface's `ijb_evals.py`, which
            puts it one stranger higher wherever it can.

    Raises:
        ValueError: as `rank_k`, or `fpir` is outside (0, 1], or all probes are mated, or none.
    """
    scores, mates = _check(scores, gallery_ids, probe_ids)
    asked = np.asarray(fpir, dtype=np.float64)
    if mode not in ("strict", "parity"):
        raise ValueError(f"mode must be 'strict' or 'parity'; got {mode!r}")
    if not np.all((asked > 0) & (asked <= 1)):
        raise ValueError(f"fpir must be in (0, 1]; got {fpir}")
    mate, others, ahead = _best_mates(scores, mates)
    mated = mates.any(1)
    if mated.all() or not mated.any():
        missing = "of strangers" if mated.all() else "with a mate in the gallery"
        raise ValueError(f"tpir_at_fpir needs probes with and without mates; got none {missing}")
    strangers = np.sort(others[~mated])[::-1]
    if mode == "strict":
        rates = np.arange(len(strangers) + 1) / len(strangers)
        allowed = np.searchsorted(rates, asked, side="right") - 1
        thresholds = np.append(strangers, -np.inf)[allowed]
    else:
        thresholds = strangers[np.maximum((asked * len(strangers)).astype(int) - 1, 0)]
    found = np.sort(mate[mated & (ahead == 0)])
    above = len(found) - np.searchsorted(found, thresholds, side="right")
    tpir = above / np.count_nonzero(mated)
    return tpir if asked.ndim else float(tpir)


def _best_mates(scores: np.ndarray, mates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best mate's score, the best other's, and how many others are not behind."""
    others = np.where(mates, -np.inf, scores)
    mate = np.where(mates, scores, -np.inf).max(1)
    ahead = np.count_nonzero((others >= mate[:, None]) & ~mates, axis=1)
    return mate, others.max(1), ahead


def _check(
    scores: np.ndarray, gallery_ids: np.ndarray, probe_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores as float64, and where probe and entry are one person."""
    scores = np.asarray(scores, dtype=np.float64)
    gallery_ids, probe_ids = np.asarray(gallery_ids), np.asarray(probe_ids)
    if gallery_ids.ndim != 1 or probe_ids.ndim != 1:
        raise ValueError(
            "gallery_ids and probe_ids must be [g] and [q]; got "
            f"{list(gallery_ids.shape)} and {list(probe_ids.shape)}"
        )
    if scores.shape != (len(probe_ids), len(gallery_ids)):
        raise ValueError(
            f"scores must be [q, g] = [{len(probe_ids)}, {len(gallery_ids)}], a row a probe; "
            f"got {list(scores.shape)}"
        )
    if not scores.size:
        raise ValueError(f"scores are empty, {list(scores.shape)}: there is nobody to identify")
    bad = np.isnan(scores) | (scores == np.inf)
    if bad.any():
        probe, entry = np.argwhere(bad)[0]
        raise ValueError(
            f"scores must be finite, or -inf for entries to leave out; {np.count_nonzero(bad)} "
            f"are not, first at [{probe}, {entry}]: look for zero or overflowing embeddings"
        )
    return scores, probe_ids[:, None] == gallery_ids[None, :]
