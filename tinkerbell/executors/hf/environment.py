"""Process-wide numeric settings, and the facts about this process that decide bits."""

import ctypes
import hashlib
import os
import platform
from pathlib import Path

import torch
import transformers

from tinkerbell import losses
from tinkerbell.executors.hf.gemm import BLOCK
from tinkerbell.executors.hf.head import CHUNK_ROWS
from tinkerbell.executors.hf.model import LoadedModel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


def configure(num_threads: int | None) -> None:
    """Fix the thread count (None: as many as torch takes, OMP_NUM_THREADS or one per core) and ask torch for
    deterministic kernels; call before the model is loaded."""
    _keep_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    # Every element of an uninitialised buffer here is written before it is read; filling them costs a pass each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")


def facts(model: LoadedModel) -> dict[str, str]:
    """`Environment.facts`: equal facts promise equal bits."""
    device = model.runtime.device
    return {
        "weights_hash": model.weights_hash,
        "dtype": str(model.runtime.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_model()}".strip(),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
        # Names the versions of MKL, oneDNN and the compiler.
        "torch_build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "transformers": transformers.__version__,
        "code": code_hash(Path(__file__).parent, Path(losses.__file__).parent),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()).lower(),
        "micro_batch": f"one unit; head rows={CHUNK_ROWS}, columns={BLOCK}",
    }


def code_hash(*packages: Path) -> str:
    """Of the modules in these directories: another release may come to other bits with everything else the same."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(package.glob("*.py")):
            digest.update(f"{package.name}/{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _keep_memory() -> None:
    """Have the C library keep freed memory: given back and taken again, the activations of every pass cost a page fault
    for each 4 KiB. Other libraries than glibc have no such knob."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_model() -> str:
    """The processor's name: kernels are chosen by it, not by the instruction set alone. Empty where unknown."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return platform.processor()
    names = [
        line.partition(":")[2].strip() for line in listing.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else ""
