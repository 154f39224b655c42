"""Rerun the tables of the FSENet paper at the scale of the data at hand, beside its numbers.

    python examples/fsenet/ablate.py --table 7                                # drawn faces
    python examples/fsenet/ablate.py --table 7 11 13 --seeds 5
    python examples/fsenet/ablate.py --table 7 --data lfw --faces lfw112.zip --seeds 5
    python examples/fsenet/ablate.py --table 6 --quick

A trial is one network of one seed: two to four minutes of a CPU core on drawn faces, seconds with
`--quick`. Trials are kept in `--output` and shared by all tables; a killed command goes on where it
was when it is given again. Every table is printed with the paper's column beside ours, and written
to `--evidence` as JSON and a figure.
"""

from dataclasses import dataclass
from pathlib import Path

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import tyro
from ablation.evidence import print_table, print_times, write_evidence
from ablation.study import Study
from ablation.tables import TABLES
from ablation.timing import TIMES, measure_times
from errors import one_line_errors
from machine import keep_freed_memory

EVIDENCE = Path(__file__).parents[2] / "docs/evidence"


@dataclass(frozen=True, kw_only=True)
class Arguments(Study):
    """Rerun tables of the FSENet paper.

    Args:
        table: numbers of tables, 5 to 14; 14 is of times, and needs no training.
        data: `procedural` draws faces; `lfw` trains on eight of LFW's ten folds and the people of
            none, and tests on the pairs of the other two; five seeds test all ten.
        faces: LFW as a folder or zip with its lists.
        seeds: trials of each arm.
        steps: updates of each network; by default 500 on drawn faces, 1,300 on LFW.
        quick: few people, few steps and one seed: shows that a table runs, and is no evidence.
        output: where trials are kept.
        evidence: where tables are written; by default docs/evidence of this repository.
    """

    table: tuple[int, ...]
    evidence: Path = EVIDENCE


def main(arguments: Arguments) -> None:
    """Run what is missing, then judge, print and write each table."""
    arguments.check()
    if not arguments.table:
        raise ValueError("--table needs numbers of tables, 5 to 14")
    trains = (arguments.seeds, arguments.steps) != (Study.seeds, None)
    if trains and set(arguments.table) == {TIMES}:
        raise ValueError("--seeds and --steps are for trainings: leave them out with --table 14")
    keep_freed_memory()
    rows = [row for number in arguments.table if number != TIMES for row in TABLES[number].rows]
    trials = arguments.collect([row.arm for row in rows])
    for number in arguments.table:
        if number == TIMES:
            found = measure_times(arguments)
            print_times(found)
        else:
            found = arguments.judged(number, trials)
            print_table(found)
        print(f"  {write_evidence(found, arguments.evidence)}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
