"""The architecture of a GPU, NVIDIA's or AMD's: torch for ROCm also calls the device "cuda"."""

from __future__ import annotations

import torch


def architecture(device: torch.device | int) -> str:
    """The name that compilers use: sm_90 for compute capability 9.0, gfx942 for an MI300X."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def has_matrix_units(device: torch.device) -> bool:
    """True if Triton's products of 16 bits run on tensor cores (8.0 and later), MFMA or WMMA there."""
    name = architecture(device)
    if name.startswith("gfx"):
        return name.startswith(("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
    return int(name.removeprefix("sm_")) >= 80
