"""The arms that a run compares, their scores on the protocol's pairs, and the numbers they give."""

from typing import Any

import numpy as np
import torch
from data.faces import TestSet
from describe import BOTH, Described
from protocols.pairs import Pairs
from protocols.rates import as_insightface, fold_rates
from torch import Tensor

from partlocal.evaluation import auc_interval, paired_accuracy_test, rank_k

COMPARISONS = (  # what the paper claims, then whether the maps are what it comes from
    ("joint: both", "global only"),
    ("joint: both", "joint: global half"),
    ("joint: both", "control: mean maps"),
    ("joint: both", "control: another person's maps"),
    ("joint: both", "control: uniform maps"),
)


def arm_vectors(
    joint: Described, alone: Described, untrained: Described | None = None
) -> dict[str, Tensor]:
    """Name the unit descriptors of each arm.

    Args:
        joint: FSENet, with its controls.
        alone: the global-only network.
        untrained: FSENet before its first step.
    """
    arms = {"global only": alone.global_half}
    arms |= {f"joint: {name}": vectors for name, vectors in joint.arms.items()}
    if untrained is not None:
        arms = {"untrained": untrained.arms[BOTH], **arms}
    for name, local in joint.controls.items():
        arms[f"control: {name}"] = joint.join(local)
    return arms


def score_pairs(vectors: Tensor, pairs: Pairs) -> np.ndarray:
    """Return the cosine of each pair of unit vectors."""
    first, second = torch.from_numpy(pairs.first), torch.from_numpy(pairs.second)
    return (vectors[first] * vectors[second]).sum(1).numpy()


def measure(
    arms: dict[str, Tensor], test: TestSet
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the numbers of each arm, paired tests between arms, and the scores of each.

    The accuracy of each fold is that at the best threshold of the other folds. Identification
    enrols the first picture of everybody and looks for all others.
    """
    numbers, correct, scores, pairs = {}, {}, {}, test.pairs
    for name, vectors in arms.items():
        scores[name] = score_pairs(vectors, pairs)
        numbers[name], folds = fold_rates(scores[name], pairs.same, pairs.fold)
        correct[name] = folds.correct
        if pairs.identities is not None:
            numbers[name] |= _by_person(vectors, scores[name], pairs, pairs.identities)
        if pairs.identities is None or test.flags.get("comparable_with_published"):
            numbers[name]["insightface"] = as_insightface(scores[name], pairs.same, pairs.fold)
        if test.lfw is not None:
            numbers[name] |= test.lfw.evaluate_all_pairs(
                test.names, vectors.numpy(), test.flags["test_folds"]
            )
    tests = [
        {"a": a, "b": b, **paired_accuracy_test(correct[a], correct[b])._asdict()}
        for a, b in COMPARISONS
        if a in correct and b in correct
    ]
    return numbers, tests, scores


def _by_person(
    vectors: Tensor, scores: np.ndarray, pairs: Pairs, identities: np.ndarray
) -> dict[str, Any]:
    """Return what only counts where it is known who is who."""
    enrolled = np.unique(identities, return_index=True)[1]
    probes = np.setdiff1d(np.arange(len(identities)), enrolled)
    who = identities[np.stack([pairs.first, pairs.second], 1)]
    found = (vectors[probes] @ vectors[enrolled].T).numpy()
    return {
        "auc_interval": list(auc_interval(scores, who)),
        "rank_1": rank_k(found, identities[enrolled], identities[probes], 1),
    }
