"""The command line: `implicit-attention COMMAND`, one file per command."""

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

    app(prog_name="implicit-attention")
