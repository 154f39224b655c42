"""All trials that tables need: the missing ones are run, the others read."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data.faces import DrawnFaces, draw_faces
from data.pair_sets import IN_TWO_PARTS
from limits import check_numbers
from machine import versions, write_json
from options import PROFILES, Options
from protocols.lfw import LfwProtocol
from run_folder import plain
from workplace import Workplace, this_process

from ablation.arms import Arm
from ablation.guides import landmarks_of, parser_of
from ablation.paper import conflicts, paper_row, read_paper
from ablation.tables import TABLES
from ablation.trial import Trial, run_trial
from ablation.verdict import judge
from ablation.world import World, drawn_world, lfw_world, test_folds
from partlocal import ParsingNet

Data = Literal["procedural", "lfw"]
STEPS = {"procedural": 500, "lfw": 1300}  # two thirds of a run's, or less: there are many trials


@dataclass(frozen=True)
class Study:
    """One data set, one way of training, and as many seeds.

    Args:
        data: `procedural` draws faces; `lfw` trains on eight of LFW's folds and the people of none
            and tests the pairs of the other two, so that five seeds test all ten.
        faces: LFW as a folder or zip with its lists.
        seeds: trials of each arm; `quick` runs one.
        steps: updates of each network; None takes `STEPS`, or 100 for `quick`.
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
            FileNotFoundError, ValueError: LFW is missing, is another set, is given where faces are
                drawn, or would be tested twice.
        """
        check_numbers(self)
        if self.quick and self.seeds != Study.seeds:
            raise ValueError("--quick runs one seed: leave --seeds out")
        if self.data == "lfw" and self.faces is None:
            raise ValueError(f"--data lfw needs --faces: {IN_TWO_PARTS}")
        if self.data == "procedural" and self.faces is not None:
            raise ValueError("--faces is for --data lfw: leave it out")
        if self.faces is not None:
            LfwProtocol.read(self.faces)
            if self.seeds > 5:
                raise ValueError(
                    f"--seeds must be at most 5 with LFW's ten folds; got {self.seeds}"
                )

    @cached_property
    def options(self) -> Options:
        """Of every trial: those of a profile, with the parser that partlocal ships."""
        options = PROFILES["default" if self.data == "procedural" else "lfw"]
        options = replace(options, parser="pretrained")
        if self.quick:
            options = replace(options, identities=60, samples=12, test_identities=60)
        return replace(options, steps=self.steps or (100 if self.quick else STEPS[self.data]))

    @cached_property
    def place(self) -> Workplace:
        """Where trials are run, in a folder that this data and these options alone have."""
        place = this_process(self.options.precision)
        faces = None if self.faces is None else self.faces.resolve().name
        how = {**plain(self.options), "precision": place.precision, "faces": faces}
        key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:8]
        folder = self.output / f"{self.data}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(how, folder / "options.json")
        return replace(place, folder=folder)

    def judged(self, number: int, trials: dict[Arm, list[Trial]]) -> dict[str, Any]:
        """Return a table with its numbers beside the paper's, and all that must be known of them.

        Args:
            number: of the table.
            trials: of its arms, at least.
        """
        table, paper = TABLES[number], read_paper()
        rows, claims = judge(table, trials, self.options.local_weight)
        own = [trial.about["versions"] for row in table.rows for trial in trials[row.arm]]
        apart = []
        for seed in range(self.seeds if self.data == "lfw" else 0):
            one = {row.arm: trials[row.arm][seed : seed + 1] for row in table.rows}
            found = judge(table, one, self.options.local_weight)[1]
            apart.append({"folds": test_folds(seed), "claims": found})
        return {
            "table": number,
            "title": table.title,
            "data": self.data,
            "evidence": not self.quick,
            "seeds": 1 if self.quick else self.seeds,
            "steps": self.options.steps,
            "options": plain(self.options),
            "precision": self.place.precision,
            "versions": {name: sorted({one[name] for one in own}) for name in own[0]},
            "rows": [{**row, "paper": paper_row(paper, number, row["name"])} for row in rows],
            "claims": claims,
            "by_folds": apart,
            "conflicts": conflicts(paper, number),
        }

    def collect(self, arms: Sequence[Arm]) -> dict[Arm, list[Trial]]:
        """Return the trials of each arm, one a seed; those that are missing are run and kept."""
        found: dict[Arm, list[Trial]] = {arm: [] for arm in arms}
        for seed in range(1 if self.quick else self.seeds):
            for arm, trial in self._of_seed(seed, list(found)):
                found[arm].append(trial)
        self._tell_other_code(found)
        return found

    def _tell_other_code(self, found: dict[Arm, list[Trial]]) -> None:
        """Say which trials other versions of the code have made: they are kept by their options."""
        made = {trial.about["versions"].get("commit") for one in found.values() for trial in one}
        if others := sorted(map(str, made - {versions().get("commit")})):
            print(
                f"some trials in {self.place.folder} are of commit {' and '.join(others)}: delete "
                "them to run them with the code that is there now",
                file=sys.stderr,
            )

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
        return draw_faces(self.seed, range(self.options.identities), self.options.samples)

    def guides(self, arm: Arm) -> tuple[ParsingNet, ParsingNet | None]:
        how = (self.options, self.seed, self.study.place)
        parser = parser_of(arm, None if arm.parser is None else self.faces, *how)
        return parser, landmarks_of(*how) if arm.kind == "landmarks" else None
