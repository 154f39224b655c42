"""Identification: who in the gallery is this? A score matrix in, rates out.

Every probe (a face to identify) is scored against every gallery entry (a face with a known name;
one person may have several). A tie between a mate, an entry of the probe's own person, and
somebody else counts against the mate.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from partlocal.evaluation.search import Vectors, score_blocks
from partlocal.evaluation.verification import nearest_thresholds

Mode = Literal["strict", "parity", "nearest"]


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
    return _of_scores(scores, gallery_ids, probe_ids).rank_k(k)


def tpir_at_fpir(
    scores: Shaped[np.ndarray, "q g"],
    gallery_ids: Shaped[np.ndarray, " g"],
    probe_ids: Shaped[np.ndarray, " q"],
    fpir: float | Float[np.ndarray, " t"],
    mode: Mode = "strict",
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
            puts it one stranger higher wherever it can. `"nearest"` lets as many strangers pass
            as come nearest to `fpir`, rounded to even, as IJB-A's peers do.

    Raises:
        ValueError: as `rank_k`, or `fpir` is outside (0, 1], or all probes are mated, or none.
    """
    return _of_scores(scores, gallery_ids, probe_ids).tpir_at_fpir(fpir, mode)


class Standings(NamedTuple):
    """How the person of each probe stands in a gallery; q probes, g entries.

    Args:
        mate: score of the best mate; `-inf` where the gallery holds none.
        other: the best score of anybody else.
        ahead: how many of the others the best mate does not beat.
        mated: whether the gallery holds a mate.
        entries: of the gallery, g.
    """

    mate: Float[np.ndarray, " q"]
    other: Float[np.ndarray, " q"]
    ahead: Int[np.ndarray, " q"]
    mated: Shaped[np.ndarray, " q"]
    entries: int

    def rank_k(self, k: int | Int[np.ndarray, " r"] = 1) -> float | Float[np.ndarray, " r"]:
        """See `rank_k`."""
        ranks = np.asarray(k)
        if not np.issubdtype(ranks.dtype, np.integer) or not np.all(
            (ranks >= 1) & (ranks <= self.entries)
        ):
            raise ValueError(f"k must be from 1 to the {self.entries} gallery entries; got {k}")
        if lost := np.count_nonzero(self.mate == -np.inf):
            raise ValueError(
                f"{lost} of {len(self.mate)} probes have no mate in the gallery, first at index "
                f"{np.argmax(self.mate == -np.inf)}: leave them out, or use tpir_at_fpir for an "
                "open set"
            )
        hits = (self.ahead[:, None] < ranks.reshape(1, -1)).mean(0)
        return hits if ranks.ndim else float(hits[0])

    def tpir_at_fpir(
        self, fpir: float | Float[np.ndarray, " t"], mode: Mode = "strict"
    ) -> float | Float[np.ndarray, " t"]:
        """See `tpir_at_fpir`."""
        asked = np.asarray(fpir, dtype=np.float64)
        if mode not in ("strict", "parity", "nearest"):
            raise ValueError(f"mode must be 'strict', 'parity' or 'nearest'; got {mode!r}")
        if not np.all((asked > 0) & (asked <= 1)):
            raise ValueError(f"fpir must be in (0, 1]; got {fpir}")
        if self.mated.all() or not self.mated.any():
            missing = "of strangers" if self.mated.all() else "with a mate in the gallery"
            raise ValueError(
                f"tpir_at_fpir needs probes with and without mates; got none {missing}"
            )
        strangers = np.sort(self.other[~self.mated])[::-1]
        side: Literal["left", "right"] = "right"  # the threshold itself does not pass
        if mode == "strict":
            rates = np.arange(len(strangers) + 1) / len(strangers)
            allowed = np.searchsorted(rates, asked, side="right") - 1
            thresholds = np.append(strangers, -np.inf)[allowed]
        elif mode == "parity":
            thresholds = strangers[np.maximum((asked * len(strangers)).astype(int) - 1, 0)]
        else:
            thresholds, side = nearest_thresholds(strangers, asked, len(strangers)), "left"
        found = np.sort(self.mate[self.mated & (self.ahead == 0)])
        above = len(found) - np.searchsorted(found, thresholds, side=side)
        tpir = above / np.count_nonzero(self.mated)
        return tpir if asked.ndim else float(tpir)

    def of(self, probes: Shaped[np.ndarray, " q"]) -> "Standings":
        """Return the standings of some of the probes."""
        mate, other, ahead, mated = (column[probes] for column in self[:4])
        return Standings(mate, other, ahead, mated, self.entries)


def standings(
    probes: Vectors,
    gallery: Vectors,
    gallery_ids: Shaped[np.ndarray, " g"],
    probe_ids: Shaped[np.ndarray, " q"],
) -> Standings:
    """Look for all probes in a gallery of vectors, of any size, and return how they stand.

    >>> gallery, probes = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.6, 0.8], [1.0, 0.0]])
    >>> found = standings(probes, gallery, np.array(["ann", "bob"]), np.array(["ann", "ann"]))
    >>> found.mate, found.ahead.tolist(), found.rank_k(1)
    (array([0.6, 1. ], dtype=float32), [1, 0], 0.5)

    The gallery is gone through twice, a block at a time: the scores of all are never held.

    Args:
        probes: q vectors; their products with the gallery's are the scores.
        gallery: g vectors of the same length.
        gallery_ids: who each gallery entry is.
        probe_ids: who each probe is.

    Raises:
        ValueError: see `score_blocks`; or numbers of ids and vectors disagree.
    """
    gallery_ids, probe_ids = np.asarray(gallery_ids), np.asarray(probe_ids)
    q, g = probes.shape[0], gallery.shape[0]
    if probe_ids.shape != (q,) or gallery_ids.shape != (g,) or not q or not g:
        raise ValueError(
            f"probe_ids and gallery_ids must be one a vector, [{q}] and [{g}], and not empty; got "
            f"{list(probe_ids.shape)} and {list(gallery_ids.shape)}"
        )
    mate, other = np.full(q, -np.inf, np.float32), np.full(q, -np.inf, np.float32)
    ahead, mated = np.zeros(q, np.int64), np.zeros(q, bool)
    for rows, columns, scores in score_blocks(probes, gallery):
        mates = probe_ids[rows, None] == gallery_ids[None, columns]
        mated[rows] |= mates.any(1)
        for best, own in ((mate, mates), (other, ~mates)):
            best[rows] = np.maximum(best[rows], scores.max(1, where=own, initial=-np.inf))
    for rows, columns, scores in score_blocks(probes, gallery):
        mates = probe_ids[rows, None] == gallery_ids[None, columns]
        ahead[rows] += np.count_nonzero((scores >= mate[rows, None]) & ~mates, axis=1)
    return Standings(mate, other, ahead, mated, g)


def _of_scores(scores: np.ndarray, gallery_ids: np.ndarray, probe_ids: np.ndarray) -> Standings:
    scores, mates = _check(scores, gallery_ids, probe_ids)
    others = np.where(mates, -np.inf, scores)
    mate = np.where(mates, scores, -np.inf).max(1)
    ahead = np.count_nonzero((others >= mate[:, None]) & ~mates, axis=1)
    return Standings(mate, others.max(1), ahead, np.any(mates, axis=1), scores.shape[1])


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
