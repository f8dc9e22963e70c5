"""Compile the Triton kernels ahead of time, without a GPU, and print what the compilers say about them as JSON lines.

    python tests/kernels/aot_report.py sm_90 forward:64 dkv:128:bf16:32x64w4 ...
    python tests/kernels/aot_report.py budget

Runs as a program of its own: a process that interprets kernels cannot compile them, and this variable tells them apart.
A case is kernel:head_dim[:dtype[:ROWSxCOLUMNSwWARPS]]; without the last the launch table decides. A kernel with a plus
behind its name, as forward+, has a bias and shares by class; statistics+ always has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmfuse.kernels.triton.backward import delta_kernel, dkv_kernel, dq_kernel
from mmfuse.kernels.triton.decode import decode_kernel
from mmfuse.kernels.triton.forward import forward_kernel
from mmfuse.kernels.triton.launch import Launch, launch_of, padded
from mmfuse.kernels.triton.statistics import statistics_kernel

KERNELS = {
    "forward": forward_kernel,
    "delta": delta_kernel,
    "dq": dq_kernel,
    "dkv": dkv_kernel,
    "decode": decode_kernel,
    "statistics": statistics_kernel,
}
SUMS = ("LSE", "DELTA", "PART", "PART_LSE", "ENTROPY", "PEAK")
#: Of bias and shares by class.
COLUMNS = ("BIAS", "SHARES", "D_SHARES", "D_BIAS")
BLOCK = 64
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Case:
    kernel: str
    head_dim: int
    dtype: str = "bf16"
    launch: Launch | None = None
    with_classes: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        kernel, head_dim, *rest = text.split(":")
        launch = None
        if len(rest) == 2:
            rows, columns, warps = map(int, re.split("[xw]", rest[1]))
            launch = Launch(rows, columns, warps, 2)
        return cls(kernel.removesuffix("+"), int(head_dim), rest[0] if rest else "bf16", launch, kernel.endswith("+"))


def constants(case: Case, launch: Launch) -> dict[str, Any]:
    every = {
        "GROUP": 4, "D": case.head_dim, "W": padded(case.head_dim), "BLOCK_Q": BLOCK, "BLOCK_K": BLOCK,
        "R": launch.rows, "C": launch.columns, "SPLITS": 8, "ACC": tl.float32, "PRECISION": "tf32",
        "MASS": None, "D_LSE": None,
    }  # fmt: skip
    if not case.with_classes:
        every |= {"BIAS": None, "CLASSES": None, "D_SHARES": None}
    names = KERNELS[case.kernel].arg_names
    return {name: value for name, value in every.items() if name in names}


def compiled(case: Case, launch: Launch, target: GPUTarget) -> Any:
    kernel, fixed = KERNELS[case.kernel], constants(case, launch)
    pointers = dict.fromkeys(["Q", "K", "V", "OUT", "D_OUT", "DQ", "DK", "DV"], case.dtype)
    pointers |= dict.fromkeys(["LSE", "DELTA", "PART", "PART_LSE", "ENTROPY", "PEAK", *COLUMNS], "fp32") | {
        "WORDS": "i64"
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.isupper():
            signature[name] = "*" + pointers.get(name, "i32")
        else:
            signature[name] = "fp32" if "scale" in name else "i32"
        if name not in fixed and (name.isupper() or name.startswith("stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.warps, "num_stages": launch.stages})


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def opcodes(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := INSTRUCTION.match(line))]


def loops(assembly: str) -> list[list[str]]:
    """The opcodes of each innermost loop: from a label to a branch back to it."""
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
    found = []
    for i, line in enumerate(lines):
        target, code = TARGET.search(line), INSTRUCTION.match(line)
        if code and code[1] == "BRA" and target and labels.get(target[1], i) < i:
            found.append((labels[target[1]], i))
    inner = [a for a in found if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in found)]
    codes = [opcodes(lines[start : stop + 1]) for start, stop in inner]
    return [loop for loop in codes if len(loop) > 60]


def nvidia_facts(kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tool("cuobjdump", "-res-usage", file.name))
        assembly = tool("nvdisasm", "-c", file.name)
    assert usage is not None
    codes = opcodes(assembly.splitlines())
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]) + int(usage[3]),
        "spills": codes.count("LDL") + codes.count("STL"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.(?:global|shared)", ptx)),
        "loops": sorted(len(loop) for loop in loops(assembly)),
    }


def amd_facts(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    # Scalars are spilled into the lanes of a vector register, not into memory: only vectors count.
    spilled = [int(count) for count in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)]
    scratch = [int(size) for size in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    assert registers is not None
    return {
        "registers": int(registers[1]),
        "stack": sum(scratch),
        "spills": sum(spilled),
        "mfma": len(re.findall(r"v_mfma", text)),
        "atomics": len(re.findall(r"\b(?:global|flat|buffer|ds)_(?:atomic|add|cmpst)", text)),
        "loops": [],
    }


def report(architecture: str, case: Case) -> dict[str, Any]:
    nvidia = architecture.startswith("sm_")
    itemsize = 4 if case.dtype == "fp32" else 2
    launch = case.launch or launch_of(case.kernel + "+" * case.with_classes, case.head_dim, itemsize, amd=not nvidia)
    target = GPUTarget("cuda", int(architecture[3:]), 32) if nvidia else GPUTarget("hip", architecture, 64)
    kernel = compiled(case, launch, target)
    facts = nvidia_facts(kernel) if nvidia else amd_facts(kernel)
    name = f"{architecture} {case.kernel}{'+' * case.with_classes} {case.head_dim} {case.dtype}"
    return {"name": name, "launch": list(launch), "shared": kernel.metadata.shared, **facts}


def budget() -> dict[str, dict[str, list[int]]]:
    """The instructions of the inner loops, by architecture and case, of every kernel as the launch table has it."""
    heads = (64, 80, 96, 128, 256)
    cases = [f"{kernel}:{dim}" for kernel in ("forward", "dq", "dkv") for dim in heads]
    cases += [f"{kernel}:{dim}" for kernel in ("delta", "decode") for dim in (64, 128, 256)]
    cases += [f"{kernel}:64:fp16" for kernel in ("forward", "dq", "dkv")]
    cases += [f"{kernel}+:{dim}" for kernel in ("forward", "dq", "dkv", "statistics") for dim in (64, 128, 256)]
    return {
        architecture: {case: report(architecture, Case.parse(case))["loops"] for case in cases}
        for architecture in ("sm_80", "sm_90", "sm_100", "gfx942")
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["budget"]:
        print(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(budget(), indent=2)))
    for text in sys.argv[2:]:
        print(json.dumps(report(sys.argv[1], Case.parse(text))), flush=True)
