"""How much the parts add to a network, and whether it is the parts that add it.

    python benchmarks/accuracy.py                          # drawn faces
    python benchmarks/accuracy.py --faces lfw112.zip       # drawn faces, and LFW's own folds
    python benchmarks/accuracy.py --quick                  # five minutes; shows that it runs

Trains, for several seeds, the backbone alone, the backbone alone with a last stage as wide as
FSENet's descriptor, and FSENet; scores FSENet's halves, both, and both under maps that are not the
picture's. Every difference stands with its interval over seeds and McNemar's test over pairs. The
trials are those of `examples/fsenet/ablate.py --table 7`, and are not run twice. Writes
accuracy.json and accuracy.png, by default to benchmarks/results/<machine>/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples/fsenet"), str(ROOT / "benchmarks")]

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import tyro
from ablation.evidence import count_seeds, draw_rows, print_table
from ablation.study import Study
from ablation.tables import TABLES
from checkpoint import whole_file
from common import circumstances, machine
from errors import one_line_errors
from machine import keep_freed_memory, write_json
from matplotlib import pyplot as plt

HEADLINE = 7  # the table of the paper that this is


@dataclass(frozen=True)
class Arguments:
    """Compare FSENet with networks without parts.

    Args:
        faces: LFW as a folder or zip with its lists; without it drawn faces alone are used.
        seeds: trials of each network.
        steps: updates of each network; by default 500 on drawn faces, 1,300 on LFW.
        quick: few people, few steps and one seed.
        trials: where trials are kept, and taken from.
        output: the folder that is written to.
    """

    faces: Path | None = None
    seeds: int = 5
    steps: int | None = None
    quick: bool = False
    trials: Path = Path("runs/ablations")
    output: Path | None = None


def main(arguments: Arguments) -> None:
    """Run the trials that are missing, print both tables, write JSON and figure."""
    if arguments.quick and arguments.seeds != Arguments.seeds:
        raise ValueError("--quick runs one seed: leave --seeds out")
    seeds = Study.seeds if arguments.quick else arguments.seeds
    how = (seeds, arguments.steps, arguments.quick, arguments.trials)
    studies = [Study("procedural", None, *how)]
    if arguments.faces is not None:
        studies.append(Study("lfw", arguments.faces, *how))
    for study in studies:
        study.check()
    keep_freed_memory()
    device = studies[0].place.device
    output = arguments.output or ROOT / "benchmarks/results" / machine(device)
    output.mkdir(parents=True, exist_ok=True)
    name = "accuracy-quick" if arguments.quick else "accuracy"
    tables = []
    for study in studies:
        trials = study.collect([row.arm for row in TABLES[HEADLINE].rows])
        tables.append(study.judged(HEADLINE, trials))
        print_table(tables[-1])
        found = {"circumstances": circumstances(device), "tables": tables}
        write_json(found, output / f"{name}.json")
        with whole_file(output / f"{name}.png") as file:
            draw(tables).savefig(file, format="png", dpi=110)
    print(f"\n{output / name}.json and .png")


def draw(tables: list[dict[str, Any]]) -> plt.Figure:
    """Return one panel a data set."""
    figure, panels = plt.subplots(
        1, len(tables), figsize=(3 + 4 * len(tables), 3.8), sharey=True, layout="constrained"
    )
    for axes, table in zip([panels] if len(tables) == 1 else panels, tables, strict=True):
        draw_rows(axes, table["rows"])
        names = {"procedural": "drawn faces", "lfw": "LFW, its own folds"}
        kind = "" if table["evidence"] else ": runs, not evidence"
        axes.set_title(f"{names[table['data']]}, {count_seeds(table)}{kind}", fontsize=10)
    return figure


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
