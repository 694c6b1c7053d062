"""What becomes of a CUDA kernel: registers, spills and machine instructions, without a GPU.

report = assemble(tensor_core_kernel(tile), TENSOR_CORE_ARGUMENTS, threads=32 * tile.warps)
report.registers, report.spill_bytes, report.count("HMMA")
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Where the wheels that come with torch keep NVIDIA's tools.
WHEEL_FOLDERS = ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "triton/backends/nvidia/bin")


@dataclass(frozen=True)
class Report:
    """What the assembler says of a kernel. `instructions` counts full names, as in ``HMMA.16816.F32``."""

    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: Counter

    def count(self, name: str) -> int:
        """Instructions of this name and its variants: ``count("HMMA")`` includes ``HMMA.16816.F32``."""
        return sum(n for full, n in self.instructions.items() if full == name or full.startswith(name + "."))


def find_tool(name: str) -> str | None:
    """The path of ``ptxas`` or ``nvdisasm``: on PATH, or in the wheels that come with torch; None where it is not."""
    site = Path(sysconfig.get_path("purelib"))
    places = [shutil.which(name), *(shutil.which(name, path=site / folder) for folder in WHEEL_FOLDERS)]
    return next((place for place in places if place), None)


def assemble(kernel, arguments: tuple, threads: int, arch: tuple[int, int] = (9, 0)) -> Report:
    """Compile a kernel function for blocks of `threads` on compute capability `arch`.

    Raises RuntimeError where the assembler is missing or refuses the code.
    """
    from numba.cuda import compile_ptx

    tools = {name: find_tool(name) for name in ("ptxas", "nvdisasm")}
    if missing := [name for name, path in tools.items() if path is None]:
        raise RuntimeError(f"{' and '.join(missing)} not found: install the CUDA toolkit, or torch with CUDA")
    ptx, _ = compile_ptx(kernel, arguments, cc=arch, launch_bounds=threads)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        target = f"-arch=sm_{arch[0]}{arch[1]}"
        said = _run(tools["ptxas"], "-v", target, str(source), "-o", str(binary))
        listing = _run(tools["nvdisasm"], "-c", str(binary))
    numbers = {
        name: sum(map(int, re.findall(pattern, said)))
        for name, pattern in {
            "registers": r"Used (\d+) registers",
            "spill_bytes": r"(\d+) bytes spill",
            "local_bytes": r"(\d+) bytes stack frame",
            "shared_bytes": r"(\d+) bytes smem",
        }.items()
    }
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", listing, re.MULTILINE)
    return Report(**numbers, instructions=Counter(names))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr
