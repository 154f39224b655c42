"""One arm of one seed: trained, tested, and kept as scores, from which every number follows."""

import json
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import score_pairs
from checkpoint import whole_file
from describe import describe
from machine import to_json, versions
from maps import cached_maps
from options import Options
from protocols.pairs import strangers
from train import recognise
from workplace import Workplace

from ablation.arms import Arm
from ablation.networks import build_network, supervise
from ablation.world import World
from partlocal import ParsingNet, PartLocalNet


@dataclass(frozen=True)
class Trial:
    """What one network scored.

    Args:
        same: whether both pictures of a pair show one person, p.
        fold: of each pair, p.
        scores: cosines of `global half`, of `local half`, and of the local half under controls.
        about: arm, seed, seconds, last losses, versions.
    """

    same: np.ndarray
    fold: np.ndarray
    scores: dict[str, np.ndarray]
    about: dict[str, Any]

    def cosines(self, vector: str, weight: float) -> np.ndarray:
        """Return the scores of a vector that a table names.

        Both halves are unit vectors, so the cosine of the joined ones follows from theirs.

        Args:
            vector: `global half`, `local half`, `both`, or a control, which stands for both halves
                with the local one under other maps.
            weight: of the local half in both.
        """
        if vector in ("global half", "local half"):
            return self.scores[vector]
        local = self.scores["local half" if vector == "both" else vector]
        return (self.scores["global half"] + weight**2 * local) / (1 + weight**2)

    def save(self, path: Path) -> None:
        """Write the scores and what is said about them."""
        with whole_file(path) as file:
            np.savez_compressed(
                file,
                same=self.same,
                fold=self.fold,
                names=np.array(list(self.scores)),
                scores=np.stack(list(self.scores.values())).astype(np.float32),
                about=np.array(to_json(self.about, indent=None)),
            )

    @classmethod
    def load(cls, path: Path) -> "Trial":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                scores = dict(zip(arrays["names"].tolist(), arrays["scores"], strict=True))
                about = json.loads(str(arrays["about"]))
                return cls(arrays["same"], arrays["fold"], scores, about)
        except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from None


def run_trial(
    arm: Arm,
    world: World,
    guides: Sequence[ParsingNet | None],
    options: Options,
    place: Workplace,
) -> Trial:
    """Train the network of an arm on the world's people and score the pairs of the others.

    What a killed trial has reached lies in a folder below `place.folder` and is gone on with. Part
    maps are kept there for the other arms of the seed.

    Args:
        arm: which.
        world: the data of a seed.
        guides: the parser, and the network of landmarks or None.
        options: of the run; its seed is the world's.
        place: where it is trained.
    """
    began = time.monotonic()
    scratch = place.folder / f"{arm.slug()}-seed{world.seed}-unfinished"
    scratch.mkdir(parents=True, exist_ok=True)
    here, seed = replace(place, folder=scratch), world.seed
    parser, landmarks = guides
    torch.manual_seed(seed)
    net = build_network(arm, options, parser, landmarks)
    net.to(device=place.device, memory_format=torch.channels_last)
    train, test = world.train(arm.people), world.test
    parts = isinstance(net, PartLocalNet)
    cached = cached_maps(net, train.images, place) if parts else None
    torch.manual_seed(seed)
    module = supervise(arm, net, train.num_identities, options, options.steps)
    fitted = recognise("trial", module, train, cached, options, here)
    vectors = describe(
        net,
        test.images,
        place,
        mean_maps=None if cached is None else cached[0].float().mean(0),
        strangers=torch.from_numpy(strangers(test.pairs.identities, seed)) if parts else None,
        test_time=options.test_time,
    )
    scores = {"global half": score_pairs(vectors.global_half, test.pairs)}
    if vectors.local_half is not None:
        scores["local half"] = score_pairs(vectors.local_half, test.pairs)
    scores |= {name: score_pairs(local, test.pairs) for name, local in vectors.controls.items()}
    about = {
        "arm": arm.slug(),
        "seed": seed,
        "people": train.num_identities,
        "pictures": len(train.images),
        "steps": fitted.steps,
        "seconds": round(time.monotonic() - began, 1),
        "numbers": vectors.global_half.shape[1]
        + (0 if vectors.local_half is None else vectors.local_half.shape[1]),
        "last": fitted.history[-1],
        "precision": place.precision,
        "protocol": test.flags,
        "versions": versions(),
    }
    shutil.rmtree(scratch)
    return Trial(test.pairs.same, test.pairs.fold, scores, about)
