"""What importing the package costs on top of torch: processor time, bytecode cached, median of fresh processes."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from implicit_attention.cli.environment import environment

TARGET_MS = 50.0
_CODE = "import time, torch; t = time.process_time(); import implicit_attention; print(time.process_time() - t)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="fresh processes (default: %(default)s)")


def run(repeats: int = 7) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        variables["PYTHONPYCACHEPREFIX"] = cache
        command = [sys.executable, "-c", _CODE]
        times = [
            1e3 * float(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)
            for _ in range(repeats + 1)
        ][1:]  # the first one compiles
    median = statistics.median(times)
    return {
        "benchmark": "imports",
        **environment(),
        "milliseconds": {"median": median, "min": min(times), "max": max(times)},
        "target_ms": TARGET_MS,
        "correct": True,
        "verdict": f"imports: {median:.0f} ms over torch alone (target at most {TARGET_MS:.0f})",
    }
