"""Rerun the tables of the FSENet paper at the scale of the data at hand, beside its numbers.

    python examples/fsenet/ablate.py --table 7                                # drawn faces
    python examples/fsenet/ablate.py --table 7 11 13 --seeds 5
    python examples/fsenet/ablate.py --table 7 --data lfw --faces lfw112.zip --seeds 5
    python examples/fsenet/ablate.py --table 6 --quick

A trial is one network of one seed; it takes one to two minutes of a CPU core on drawn faces, and
with `--quick` ten seconds. Trials are kept in `--output` and shared by all tables, and a killed
command goes on where it was when it is given again. Every table is printed with the paper's
column, and written to `--evidence` as JSON and a figure.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import torch
import tyro
from ablation.arms import Arm
from ablation.evidence import print_table, write_evidence
from ablation.guides import landmarks_of, parser_of
from ablation.paper import conflicts, paper_row, read_paper
from ablation.tables import TABLES
from ablation.timing import time_arms
from ablation.trial import Trial, run_trial
from ablation.verdict import judge
from ablation.world import World, drawn_for_guides, drawn_world, lfw_world
from fit import Workplace
from limits import check_numbers
from machine import choose_precision, keep_freed_memory, versions, write_json
from options import PROFILES, Options
from run_folder import one_line_errors, plain

from partlocal import ParsingNet

Data = Literal["procedural", "lfw"]
TIMES = 14  # the table of times, which needs no training
EVIDENCE = Path(__file__).parents[2] / "docs/evidence"


@dataclass(frozen=True)
class Arguments:
    """Rerun tables of the FSENet paper.

    Args:
        table: numbers of tables, 5 to 14.
        data: `procedural` draws faces; `lfw` trains on eight of LFW's ten folds and the people of
            none, and tests on the pairs of the other two; five seeds test all ten.
        faces: LFW as a folder or zip with its lists.
        seeds: trials of each arm.
        steps: updates of each network; by default those of the profile `default` or `lfw`.
        quick: few people, few steps and one seed: shows that a table runs, and is no evidence.
        output: where trials are kept.
        evidence: where tables are written; by default docs/evidence of this repository.
    """

    table: tuple[int, ...]
    data: Data = "procedural"
    faces: Path | None = None
    seeds: int = 3
    steps: int | None = None
    quick: bool = False
    output: Path = Path("runs/ablations")
    evidence: Path = EVIDENCE


def main(arguments: Arguments) -> None:
    """Run what is missing, then judge and write each table."""
    options = run_options(arguments)
    folder = arguments.output / f"{arguments.data}-{_key(options)}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(plain(options), folder / "options.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = Workplace(folder, device, choose_precision(options.precision, device))
    keep_freed_memory()

    rows = [row for n in arguments.table if n != TIMES for row in TABLES[n].rows]
    arms = list(dict.fromkeys(row.arm for row in rows))
    seeds = range(1 if arguments.quick else arguments.seeds)
    trials: dict[Arm, list[Trial]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, trial in run_seed(arms, seed, arguments, options, place):
            trials[arm].append(trial)

    paper = read_paper()
    about = {
        "data": arguments.data,
        "evidence": not arguments.quick,
        "seeds": len(seeds),
        "options": plain(options),
        "precision": place.precision,
        "versions": versions(),
    }
    for number in arguments.table:
        found: dict[str, Any] = {"table": number, **about, "conflicts": conflicts(paper, number)}
        if number == TIMES:
            pictures = 600 if arguments.quick else 12_000
            parser = ParsingNet.pretrained().freeze().to(device)
            times = time_arms(options, parser, place, pictures)
            found |= {"title": "time", "times": times, "threads": torch.get_num_threads()}
        else:
            table = TABLES[number]
            judged, claims = judge(table, trials, options.local_weight)
            judged = [{**row, "paper": paper_row(paper, number, row["name"])} for row in judged]
            found |= {"title": table.title, "steps": options.steps}
            found |= {"rows": judged, "claims": claims}
        print_table(found)
        print(f"  {write_evidence(found, arguments.evidence)}")


def run_seed(
    arms: list[Arm], seed: int, arguments: Arguments, options: Options, place: Workplace
) -> Iterator[tuple[Arm, Trial]]:
    """Yield the trial of each arm, from its file or newly run; the data is made when needed."""
    options = replace(options, seed=seed)
    world: World | None = None
    guides = None
    for number, arm in enumerate(arms):
        path = place.folder / f"{arm.slug()}-seed{seed}.npz"
        if not path.exists():
            if world is None:
                world = make_world(seed, arguments, options)
            print(f"seed {seed}, arm {number + 1} of {len(arms)}: {arm.slug()}", file=sys.stderr)
            faces = None
            if arm.parser is not None:
                guides = drawn_for_guides(seed, options) if guides is None else guides
                faces = guides
            parser = parser_of(arm, faces, options, seed, place)
            points = landmarks_of(options, seed, place) if arm.kind == "landmarks" else None
            run_trial(arm, world, (parser, points), options, place).save(path)
        yield arm, Trial.load(path)
    for maps in place.folder.glob("maps-*.npz"):
        maps.unlink()


def make_world(seed: int, arguments: Arguments, options: Options) -> World:
    """Draw or read the data of a seed."""
    if arguments.data == "procedural":
        return drawn_world(seed, options)
    assert arguments.faces is not None
    return lfw_world(seed, arguments.faces)


def run_options(arguments: Arguments) -> Options:
    """Return the options of every trial: those of a profile, smaller with `--quick`."""
    options = PROFILES["default" if arguments.data == "procedural" else "lfw"]
    options = replace(options, parser="pretrained")
    if arguments.quick:
        options = replace(options, identities=60, samples=12, test_identities=60, steps=100)
    if arguments.steps is not None:
        options = replace(options, steps=arguments.steps)
    return options


def check(arguments: Arguments) -> None:
    """Refuse what cannot be run, before anything is made."""
    check_numbers(arguments)
    if (arguments.faces is None) != (arguments.data == "procedural"):
        raise ValueError(
            "--data lfw needs --faces: LFW as a folder or zip with its lists"
            if arguments.data == "lfw"
            else "--faces is for --data lfw: leave it out"
        )


def _key(options: Options) -> str:
    text = json.dumps(plain(options), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


if __name__ == "__main__":
    with one_line_errors():
        chosen = tyro.cli(Arguments)
        check(chosen)
        main(chosen)
