"""Count what ParsingNet costs by stacks and grid, and write the table into docs/parser.md.

python docs/parser_cost.py            # shapes alone are computed, on the meta device
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from partlocal import ParsingNet

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parser.md"
BEGIN, END = "<!-- cost -->\n\n", "\n<!-- /cost -->\n"


def multiply_adds(module: nn.Module, dtype: torch.dtype = torch.uint8) -> float:
    """Count the multiply-adds of one 112x112 picture, in millions."""
    picture = torch.zeros(1, 3, 112, 112, dtype=dtype, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(picture)
    return counter.get_total_flops() / 2e6


def table() -> str:
    """Return the rows of all stacks and grids, beside FSENet's backbone."""
    sys.path.insert(0, str(ROOT / "examples" / "fsenet"))
    from iresnet import iresnet50  # noqa: PLC0415  (the recipe is no package)

    with torch.device("meta"):
        backbone = multiply_adds(iresnet50(), torch.float32)
    rows = [
        "| stacks | grid | parameters | million multiply-adds | of iresnet50 |",
        "|---:|---:|---:|---:|---:|",
    ]
    for stacks in (1, 2, 3):
        for grid in (32, 64, 128):
            parser = ParsingNet(num_stacks=stacks, grid=grid, device="meta")
            size = sum(p.numel() for p in parser.parameters())
            cost = multiply_adds(parser)
            default = " (default)" if (stacks, grid) == (2, 64) else ""
            share = f"{100 * cost / backbone:.1f} %"
            rows.append(f"| {stacks} | {grid}{default} | {size:,} | {cost:,.0f} | {share} |")
    rows.append(f"\niresnet50 takes {backbone:,.0f} million multiply-adds at 112x112.")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
