"""The commit that figures are made by, which every record names."""

import subprocess
from pathlib import Path


def checked_out() -> str | None:
    """Return the commit that is checked out; None outside of a checkout, or with changes that are not committed."""
    here = Path(__file__).parent
    try:
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() or None if changed.returncode == 0 and not changed.stdout else None
