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
from typing import Any, Literal

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import torch
import tyro
from ablation.evidence import print_table, write_evidence
from ablation.paper import conflicts, paper_row, read_paper
from ablation.study import Study
from ablation.tables import TABLES
from ablation.timing import time_arms
from ablation.verdict import judge
from limits import check_numbers
from machine import keep_freed_memory
from run_folder import one_line_errors

from partlocal import ParsingNet

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
    data: Literal["procedural", "lfw"] = "procedural"
    faces: Path | None = None
    seeds: int = 3
    steps: int | None = None
    quick: bool = False
    output: Path = Path("runs/ablations")
    evidence: Path = EVIDENCE


def main(arguments: Arguments) -> None:
    """Run what is missing, then judge, print and write each table."""
    check_numbers(arguments)
    study = Study(
        arguments.data,
        arguments.faces,
        arguments.seeds,
        arguments.steps,
        arguments.quick,
        arguments.output,
    )
    study.check()
    keep_freed_memory()
    rows = [row for number in arguments.table if number != TIMES for row in TABLES[number].rows]
    trials = study.collect([row.arm for row in rows])
    paper = read_paper()
    for number in arguments.table:
        found = {"table": number, **study.about(), "conflicts": conflicts(paper, number)}
        if number == TIMES:
            found |= measure_times(study)
        else:
            table = TABLES[number]
            judged, claims = judge(table, trials, study.options.local_weight)
            judged = [{**row, "paper": paper_row(paper, number, row["name"])} for row in judged]
            found |= {"title": table.title, "rows": judged, "claims": claims}
        print_table(found)
        print(f"  {write_evidence(found, arguments.evidence)}")


def measure_times(study: Study) -> dict[str, Any]:
    """Return what describing 12,000 pictures takes, 600 of a quick study."""
    parser = ParsingNet.pretrained().freeze().to(study.place.device)
    pictures = 600 if study.quick else 12_000
    times = time_arms(study.options, parser, study.place, pictures)
    return {"title": "time", "times": times, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
