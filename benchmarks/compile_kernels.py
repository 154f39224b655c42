"""Compile every kernel for GPUs that need not be there, and print what it takes of them.

    python benchmarks/compile_kernels.py           # a table, tab-separated
    python benchmarks/compile_kernels.py --json    # the same, for tests

The operations run as they are, on small tensors on the CPU; in place of a launch, the kernel is
compiled with the very arguments of the launch for each target. Nothing is timed: not measured on
a GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from partlocal.kernels import DTYPES
from partlocal.kernels import part_maps as mapping
from partlocal.kernels import part_mask_pool as pooling
from partlocal.kernels import structure_correlation as structure

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
    torch.bool: "*i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

Case = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes of a GPU."""

    case: str
    kernel: str
    target: str
    registers: int  # a thread
    spills: int  # bytes of stack or scratch a thread
    shared: int  # bytes a program
    doubles: int  # instructions in float64
    load_bits: int  # of the widest load from global memory


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


def compile_launches(operation: Callable[[], object]) -> Iterator[tuple[str, GPUTarget, Any]]:
    """Run `operation`, and yield (kernel, target, compiled) for each of its launches."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in self.params]
        options = {key: kwargs.pop(key) for key in list(kwargs) if key not in names}
        arguments = dict(zip(names, args, strict=False)) | kwargs
        launches.append((self, specialise(self, arguments), options))

    with patch.object(JITFunction, "run", record):
        operation()
    for kernel, source, options in launches:
        for target in TARGETS:
            yield kernel.__name__, target, triton.compile(source, target=target, options=options)


def report(case: str, kernel: str, target: GPUTarget, compiled: Any) -> Report:
    """Read what the kernel takes from its assembler and from the tool in Triton's wheel."""
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        fields, doubles = (r"REG:(\d+)", r"STACK:(\d+)"), ".f64"
        widths = map(_ptx_bits, re.findall(r"(?:ld\.global|cp\.async\.c[ag])[^;]*;", text))
    else:
        usage = text = compiled.asm["amdgcn"]
        fields = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        doubles = "_f64"
        widths = map(_amd_bits, re.findall(r"(?:global|buffer)_load_\w+", text))
    registers, spills = (int(re.search(field, usage)[1]) for field in fields)
    return Report(
        case,
        kernel,
        f"sm_{target.arch}" if target.backend == "cuda" else target.arch,
        registers,
        spills,
        compiled.metadata.shared,
        text.count(doubles),
        max(widths, default=0),
    )


def _ptx_bits(load: str) -> int:
    if load.startswith("cp.async"):
        return 8 * int(re.search(r"\], (0x\w+|\d+)", load)[1], 0)
    vector = re.search(r"\.v(\d)", load)
    return int(vector[1] if vector else 1) * int(re.search(r"\.[bfus](\d+)", load)[1])


def _amd_bits(load: str) -> int:
    if "dword" in load:
        return 32 * int(re.search(r"dwordx?(\d*)", load)[1] or 1)
    return 16 if "short" in load else 8


def structure_cases() -> Iterator[Case]:
    """Yield what runs `structure_correlation` with every block its configuration chooses."""
    shapes = [(k, 128) for k in (2, 6, 11, 20, 33, 100, 256)] + [(6, 16), (6, 130), (6, 2048)]
    for k, c in shapes:
        for dtype in DTYPES if (k, c) == (6, 128) else [torch.float32]:

            def run(k=k, c=c, dtype=dtype, kind=torch.bool if k == 2 else torch.float32):
                parts, seen = torch.ones(2, k, c, dtype=dtype), torch.ones(2, k, dtype=kind)
                out = structure.structure_correlation(parts, seen, dtype)
                structure.structure_correlation_backward(out, parts, seen)

            yield f"structure k={k} c={c} {dtype}".replace("torch.", ""), run


def pool_cases() -> Iterator[Case]:
    """Yield what runs `part_mask_pool`: the layouts and dtypes of FSENet's shape, and others."""
    face = [
        (mode, 256, 6, 128, 28, layout, dtype)
        for mode in ("sum", "max")
        for layout in ("contiguous", "channels_last")
        for dtype in DTYPES
    ]
    others = [
        ("mean", 1, 6, 128, 28, "contiguous", torch.float32),
        ("max", 1, 6, 128, 28, "contiguous", torch.float32),
        ("sum", 1, 6, 128, 28, "crop", torch.float32),
        ("max", 256, 6, 128, 28, "crop", torch.float32),
        *(("sum", 256, 20, 128, 28, "contiguous", dtype) for dtype in DTYPES),
        *(("max", 256, k, 128, 28, "contiguous", torch.float32) for k in (2, 20)),
        *((mode, 256, 1, 1, 4, "contiguous", torch.float32) for mode in ("sum", "max")),
        *(("sum", 256, 6, 2048, 7, layout, torch.bfloat16) for layout in ("contiguous", "tokens")),
    ]
    for mode, b, k, c, side, layout, dtype in face + others:

        def run(mode=mode, b=b, k=k, c=c, side=side, layout=layout, dtype=dtype):
            shape = (1, c, side, side)
            features = torch.ones(shape, dtype=dtype)
            if layout in ("channels_last", "tokens"):
                features = features.contiguous(memory_format=torch.channels_last)
            elif layout == "crop":
                features = torch.ones(1, c, side + 2, side + 4, dtype=dtype)[..., 1:-1, 2:-2]
            features = features.expand(b, -1, -1, -1)
            maps, seen = torch.ones(1, k, side, side).expand(b, -1, -1, -1), torch.ones(b, k)
            parts, _, _, cell = pooling.pool(features, maps, seen, mode, True, 0.0, 0.5)
            last = pooling.is_channels_last(features)
            if mode == "max":
                pooling.spread_maxima(parts, cell, (side, side), dtype, last)
            else:
                pooling.spread_parts(parts, maps, dtype, last)
                pooling.part_products(parts, features)

        yield f"{mode} b={b} k={k} c={c} {side}x{side} {layout} {dtype}".replace("torch.", ""), run


def maps_cases() -> Iterator[Case]:
    """Yield what runs `part_maps`: FSENet's shape in all its variants, and other label counts."""
    variants = [
        (11, 128, 28, activation, norm, over_parts, use_max, torch.float32)
        for activation in ("softmax", "sigmoid", "none")
        for norm in ("l2", "sum", "none")
        for over_parts in (False, True)
        for use_max in (True, False)
        if norm == "l2" or activation == "softmax"
    ]
    others = [
        *((11, 128, 28, "softmax", "l2", False, True, dtype) for dtype in DTYPES[1:]),
        *((n, 64, 16, "softmax", "l2", False, True, torch.bfloat16) for n in (2, 19, 150, 1024)),
        (11, 4, 9, "softmax", "l2", False, False, torch.float32),
    ]
    for n, old, new, activation, norm, over_parts, use_max, dtype in variants + others:

        def run(
            n=n, old=old, new=new, how=(activation, norm, over_parts), use_max=use_max, dtype=dtype
        ):
            logits, labels = torch.ones(2, n, old, old, dtype=dtype), list(range(min(n, 6)))
            found = mapping.maps_and_peaks(logits, labels, [new, new], *how, use_max, dtype)
            maps, cell, peak, at = found
            mapping.maps_backward(maps, peak, logits, cell, at, labels, *how)

        kind = f"{activation} {norm}{' parts' * over_parts} {'max' if use_max else 'area'}"
        yield f"maps n={n} {old} to {new} {kind} {dtype}".replace("torch.", ""), run


def main() -> None:
    """Print one line a kernel and target."""
    rows = []
    for case, operation in chain(maps_cases(), structure_cases(), pool_cases()):
        for kernel, target, compiled in compile_launches(operation):
            rows.append(asdict(report(case, kernel, target, compiled)))
            if "--json" not in sys.argv:
                if len(rows) == 1:
                    print(*rows[0], sep="\t")
                print(*rows[-1].values(), sep="\t", flush=True)
    if "--json" in sys.argv:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
