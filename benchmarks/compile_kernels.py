"""Compile every kernel for GPUs that need not be there, and print what it takes of them.

    python benchmarks/compile_kernels.py              # a table, tab-separated, and its summary
    python benchmarks/compile_kernels.py --summary    # the summary alone
    python benchmarks/compile_kernels.py --json       # the table, for tests

The operations run as they are, on small tensors on the CPU; in place of a launch, the kernel is
compiled with the very arguments of the launch for each target, in as many processes as there are
cores. What launches agree in is compiled once. Nothing is timed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))
from compile_cases import all_cases

TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("hip", "gfx942", 64),
]
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Launch(NamedTuple):
    """A kernel with its arguments specialised as for a launch."""

    source: ASTSource
    options: dict[str, Any]
    blocks: dict[str, int]  # and numbers of warps and stages
    flags: dict[str, str]  # the other constants, and the types of what pointers point at

    @property
    def key(self) -> str:
        """What decides the compiled kernel: launches that share it are the same."""
        source = self.source
        return repr((source.fn.__name__, source.signature, source.constants, source.attrs, self[1]))


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes of a GPU."""

    case: str
    kernel: str
    target: str
    blocks: dict[str, int]
    flags: dict[str, str]
    registers: int  # a thread
    spills: int  # bytes of stack or scratch a thread
    shared: int  # bytes a program
    doubles: int  # instructions in float64
    load_bits: int  # of the widest load from global memory; 0: what all lanes share, on AMD
    loads: dict[str, int]  # the same by the name that the kernel gives to what it loads


def launches_of(operation: Callable[[], object]) -> list[Launch]:
    """Run `operation`, and return its launches, of which none takes place."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in self.params]
        options = {key: kwargs.pop(key) for key in list(kwargs) if key not in names}
        arguments = dict(zip(names, args, strict=False)) | kwargs
        constants = {p.name: arguments[p.name] for p in self.params if p.is_constexpr}
        blocks = {key: value for key, value in constants.items() if key.startswith("BLOCK")}
        blocks |= {key: options[key] for key in ("num_warps", "num_stages") if key in options}
        flags = {key: str(value) for key, value in constants.items() if key not in blocks}
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor):
                flags[key] = POINTER[value.dtype].removeprefix("*")
        launches.append(Launch(specialise(self, arguments), options, blocks, flags))

    with patch.object(JITFunction, "run", record):
        operation()
    return launches


def pairs_of(mapping: dict[str, Any]) -> str:
    """Return a dictionary as one field of a table.

    >>> pairs_of({"BLOCK_K": 8, "num_warps": 4})
    'BLOCK_K=8 num_warps=4'
    """
    return " ".join(f"{key}={value}" for key, value in mapping.items())


def specialise(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """Return the kernel with its arguments specialised as a launch would."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind, divisible = None, False
        if isinstance(value, torch.Tensor):
            kind, divisible = POINTER[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        elif type(value) is int and value != 1:
            kind, divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if parameter.is_constexpr or kind is None:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = kind
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def report(case: str, launch: Launch, target: GPUTarget) -> Report:
    """Compile, and read what it takes from the assembler and from the tool in Triton's wheel."""
    compiled = triton.compile(launch.source, target=target, options=launch.options)
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        fields, doubles = (r"REG:(\d+)", r"STACK:(\d+)"), ".f64"
    else:
        usage = text = compiled.asm["amdgcn"]
        fields = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        doubles = "_f64"
    registers, spills = (int(re.search(field, usage)[1]) for field in fields)
    loads = loads_of(text, launch.source.fn)
    return Report(
        case,
        launch.source.fn.__name__,
        f"sm_{target.arch}" if target.backend == "cuda" else target.arch,
        launch.blocks,
        launch.flags,
        registers,
        spills,
        compiled.metadata.shared,
        text.count(doubles),
        max(loads.values(), default=0),
        loads,
    )


def loads_of(text: str, kernel: JITFunction) -> dict[str, int]:
    """Return the bits of the widest load of each name, "" for what the kernel does not name."""
    path = kernel.fn.__code__.co_filename
    file = re.search(rf'\.file\s+(\d+).*"(?:.*/)?{re.escape(Path(path).name)}"', text)[1]
    found: dict[str, int] = {}
    place, opened, fresh = "", False, False
    for line in text.splitlines():
        # In NVIDIA's, a load is written within inline assembler, whose lines count on from its own.
        if line.strip().endswith("inline asm"):
            opened = "begin" in line
            place = place if opened else ""
            fresh = opened
        elif at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            if not opened or fresh:
                place, fresh = _name_at(path, int(at[2])) if at[1] == file else "", False
        elif load := re.search(r"(?:ld\.global|cp\.async\.c[ag])[^;]*;", line):
            found[place] = max(found.get(place, 0), _ptx_bits(load[0]))
        elif load := re.search(r"(?:global|buffer)_load_\w+", line):
            found[place] = max(found.get(place, 0), _amd_bits(load[0]))
    return found


@cache
def _name_at(path: str, line: int) -> str:
    name = re.match(r"\s*(\w+) \+?= tl\.load\(", _lines_of(path)[line - 1])
    return name[1] if name else ""


@cache
def _lines_of(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _ptx_bits(load: str) -> int:
    if load.startswith("cp.async"):
        return 8 * int(re.search(r"\], (0x\w+|\d+)", load)[1], 0)
    vector = re.search(r"\.v(\d)", load)
    return int(vector[1] if vector else 1) * int(re.search(r"\.[bfus](\d+)", load)[1])


def _amd_bits(load: str) -> int:
    if "dword" in load:
        return 32 * int(re.search(r"dwordx?(\d*)", load)[1] or 1)
    return 16 if "short" in load else 8


def reports(cases: Iterable[tuple[str, Callable[[], object]]]) -> Iterator[Report]:
    """Compile what the cases launch, each once for each target, in all cores."""
    found: dict[tuple[str, str], tuple[str, Launch, GPUTarget]] = {}
    for case, operation in cases:
        for backend, version in (("cuda", None), ("hip", "as on AMD")):
            with patch.object(torch.version, "hip", version):
                launches = launches_of(operation)
            for launch, target in product(launches, TARGETS):
                if target.backend == backend:
                    found.setdefault((launch.key, str(target)), (case, launch, target))
    _work[:] = found.values()
    # Forked, the processes have the kernels, which cannot be sent to them.
    with get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from pool.imap(_report_at, range(len(_work)))


_work: list[tuple[str, Launch, GPUTarget]] = []


def _report_at(place: int) -> Report:
    return report(*_work[place])


def summary(rows: list[Report]) -> Iterator[tuple[object, ...]]:
    """Yield a heading, and a line for each kernel and target."""
    yield (
        *("kernel", "target", "variants", "sets of blocks", "registers, least", "registers, most"),
        *("spills, most", "shared, most", "widest load, least", "widest load, most"),
    )
    groups: dict[tuple[str, str], list[Report]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.target), []).append(row)
    for key, group in groups.items():
        registers = [row.registers for row in group]
        bits = [row.load_bits for row in group]
        yield (
            *key,
            len(group),
            len({pairs_of(row.blocks) for row in group}),
            min(registers),
            max(registers),
            max(row.spills for row in group),
            max(row.shared for row in group),
            min(bits),
            max(bits),
        )


def main() -> None:
    """Print one line a kernel and target."""
    rows = []
    table = not {"--json", "--summary"} & set(sys.argv)
    for row in reports(all_cases()):
        rows.append(row)
        if table:
            fields = asdict(row)
            if len(rows) == 1:
                print(*fields, sep="\t")
            values = (pairs_of(x) if isinstance(x, dict) else x for x in fields.values())
            print(*values, sep="\t", flush=True)
    if "--json" in sys.argv:
        print(json.dumps([asdict(row) for row in rows]))
        return
    for line in summary(rows):
        print(*line, sep="\t")
    print(f"triton {triton.__version__}")


if __name__ == "__main__":
    main()
