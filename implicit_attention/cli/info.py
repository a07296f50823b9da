"""`implicit-attention info`: versions, devices, and which kernels serve, for a look and for reports of faults."""

import torch

from implicit_attention.causal import cpu, engines
from implicit_attention.causal.forward_substitution import solved_with
from implicit_attention.cli.environment import environment


def info() -> None:
    """Show versions, devices, and which kernels compute causal layers here.

    Paste this into a report of a fault.
    """
    found = environment()
    lines = {**found["versions"], "system": found["system"], "processor": found["processor"]}
    lines |= {"threads": str(found["threads"]), "devices": _devices()}
    lines |= {f'kernel="{name}"': state for name, state in engines.states(solved_with).items()}
    if cpu.problem() is None:
        lines["instructions"] = f"{cpu.capability()} (of the C++ kernels; {cpu.VARIABLE} chooses)"
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        print(f"{name:{width}}{value if value is not None else 'not installed'}")


def _devices() -> str:
    found = ["cpu"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found += [
            f"cuda:{i} {torch.cuda.get_device_name(i)} {torch.cuda.get_device_capability(i)}" for i in range(count)
        ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)
