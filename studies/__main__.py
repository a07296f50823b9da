"""`python -m studies` does the same as `implicit-attention eval`."""

from studies.command import app

if __name__ == "__main__":
    app(prog_name="python -m studies")
