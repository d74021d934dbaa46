"""The number format that the networks compute in, chosen by what the processor can do.

Weights, optimiser states, losses and output heads stay float32; the trunks' matrix products and activations run in
the chosen format. Measured at width 256: bfloat16 doubles the matmul peak with avx512_bf16 and slows down on AVX2.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86 with AMX, ARM
MIN_WIDTH = 128  # below it the casts cost more than the products save


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of this machine's processor; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def compute_dtype(device: torch.device, width: int, flags: frozenset[str] | None = None) -> torch.dtype:
    """The trunks' format on a device.

    Args:
        width: of the narrowest trunk.
        flags: processor features; None asks this machine.
    """
    if width < MIN_WIDTH:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = not (cpu_flags() if flags is None else flags).isdisjoint(NATIVE_BF16)
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32
