"""How much memory is free where a model is, and which share of it a KV cache takes unless it is told otherwise."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

GIB = 2**30
#: Of what is free once the weights are loaded. A machine's memory has other users; a GPU's has the activations.
SHARE_OF_MEMORY, SHARE_OF_GPU = 0.25, 0.8
_CGROUP = Path("/sys/fs/cgroup")
#: Limit and use of a container's memory: control groups of version 2, and of version 1.
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def free_bytes(device: torch.device) -> int:
    """Of the GPU, or of this machine or container, whichever has less."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of tensors that are gone is free as well
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), *_container_bytes())


def usual_kv_cache(device: torch.device) -> int:
    """Bytes of a KV cache whose size nobody set."""
    return int(free_bytes(device) * (SHARE_OF_GPU if device.type == "cuda" else SHARE_OF_MEMORY))


def gib(num_bytes: float) -> str:
    """As text, of three digits."""
    return f"{num_bytes / GIB:.3g} GiB"


def _container_bytes() -> list[int]:
    found = [1 << 62]
    for limit, use in _LIMITS:
        try:
            allowed, used = (_CGROUP / limit).read_text().strip(), int((_CGROUP / use).read_text())
        except (OSError, ValueError):  # no such control group here
            continue
        if allowed != "max":
            found.append(max(0, int(allowed) - used))
    return found
