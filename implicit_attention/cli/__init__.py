"""The command line: `implicit-attention COMMAND`, one file per command."""

import os
import sys


def main() -> None:
    """Run the command line; without its optional packages, say how to install them and exit with status 2."""
    try:
        import matplotlib  # noqa: F401 (the commands draw)
        import rich  # noqa: F401 (and typer alone is not enough)
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: pip install 'implicit-attention[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    from implicit_attention.cli.app import app

    try:
        app(prog_name="implicit-attention")
    except SystemExit as end:
        if "WORLD_SIZE" in os.environ and end.code in (0, None):
            _leave()
        raise


def _leave() -> None:
    """End a process of torchrun that has done its work, without the interpreter's shutdown.

    Gloo's threads outlive `destroy_process_group` while anything refers to the group, as DTensor's caches do. A thread
    that releases a tensor during shutdown makes the process abort after its work is done (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
