"""All trials that tables need: the missing ones are run, the others read."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from data.faces import DrawnFaces
from fit import Workplace
from machine import choose_precision, versions, write_json
from options import PROFILES, Options
from run_folder import plain

from ablation.arms import Arm
from ablation.guides import landmarks_of, parser_of
from ablation.trial import Trial, run_trial
from ablation.world import World, drawn_for_guides, drawn_world, lfw_world
from partlocal import ParsingNet

Data = Literal["procedural", "lfw"]


@dataclass(frozen=True)
class Study:
    """One data set, one way of training, and as many seeds.

    Args:
        data: `procedural` draws faces; `lfw` trains on eight of LFW's folds and the people of none
            and tests the pairs of the other two, so that five seeds test all ten.
        faces: LFW as a folder or zip with its lists.
        seeds: trials of each arm; `quick` runs one.
        steps: updates of each network; None takes the profile's.
        quick: few people and few steps: shows that it runs, and is no evidence.
        output: where trials are kept.
    """

    data: Data = "procedural"
    faces: Path | None = None
    seeds: int = 3
    steps: int | None = None
    quick: bool = False
    output: Path = Path("runs/ablations")

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ValueError: LFW is missing, or given where faces are drawn.
        """
        if self.data == "lfw" and self.faces is None:
            raise ValueError("--data lfw needs --faces: LFW as a folder or zip with its lists")
        if self.data == "procedural" and self.faces is not None:
            raise ValueError("--faces is for --data lfw: leave it out")

    @cached_property
    def options(self) -> Options:
        """Of every trial: those of a profile, with the parser that partlocal ships."""
        options = PROFILES["default" if self.data == "procedural" else "lfw"]
        options = replace(options, parser="pretrained")
        if self.quick:
            options = replace(options, identities=60, samples=12, test_identities=60, steps=100)
        return options if self.steps is None else replace(options, steps=self.steps)

    @cached_property
    def place(self) -> Workplace:
        """Where trials are run, in a folder that these options alone have."""
        text = json.dumps(plain(self.options), sort_keys=True)
        folder = self.output / f"{self.data}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(plain(self.options), folder / "options.json")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Workplace(folder, device, choose_precision(self.options.precision, device))

    def about(self) -> dict[str, Any]:
        """Return what must be known beside the numbers."""
        return {
            "data": self.data,
            "evidence": not self.quick,
            "seeds": 1 if self.quick else self.seeds,
            "steps": self.options.steps,
            "options": plain(self.options),
            "precision": self.place.precision,
            "versions": versions(),
        }

    def collect(self, arms: Sequence[Arm]) -> dict[Arm, list[Trial]]:
        """Return the trials of each arm, one a seed; those that are missing are run and kept."""
        found: dict[Arm, list[Trial]] = {arm: [] for arm in arms}
        for seed in range(1 if self.quick else self.seeds):
            for arm, trial in self._of_seed(seed, list(found)):
                found[arm].append(trial)
        return found

    def _of_seed(self, seed: int, arms: list[Arm]) -> Iterator[tuple[Arm, Trial]]:
        options, place = replace(self.options, seed=seed), self.place
        made = _Made(self, seed, options)
        for number, arm in enumerate(arms):
            path = place.folder / f"{arm.slug()}-seed{seed}.npz"
            if not path.exists():
                print(
                    f"seed {seed}, arm {number + 1} of {len(arms)}: {arm.slug()}", file=sys.stderr
                )
                trial = run_trial(arm, made.world, made.guides(arm), options, place)
                trial.save(path)
            yield arm, Trial.load(path)
        for maps in place.folder.glob("maps-*.npz"):
            maps.unlink()


@dataclass(frozen=True)
class _Made:
    """What the trials of a seed share, made when the first asks for it."""

    study: Study
    seed: int
    options: Options

    @cached_property
    def world(self) -> World:
        if self.study.faces is None:
            return drawn_world(self.seed, self.options)
        return lfw_world(self.seed, self.study.faces)

    @cached_property
    def faces(self) -> DrawnFaces:
        return drawn_for_guides(self.seed, self.options)

    def guides(self, arm: Arm) -> tuple[ParsingNet, ParsingNet | None]:
        how = (self.options, self.seed, self.study.place)
        parser = parser_of(arm, None if arm.parser is None else self.faces, *how)
        return parser, landmarks_of(*how) if arm.kind == "landmarks" else None
