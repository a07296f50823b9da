"""`python -m benchmarks NAME [--out FILE.json]`."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import (
    bidirectional,
    causal,
    contraction,
    conversion,
    decode,
    encoder,
    feedback,
    gpu,
    hard,
    imports,
    language_model,
    layer,
    packing,
)

BENCHMARKS = {
    "bidirectional": bidirectional,
    "causal": causal,
    "contraction": contraction,
    "conversion": conversion,
    "decode": decode,
    "encoder": encoder,
    "feedback": feedback,
    "gpu": gpu,
    "hard": hard,
    "imports": imports,
    "language_model": language_model,
    "layer": layer,
    "packing": packing,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark, print its JSON, and return 1 if its results were wrong (speed is only reported)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        module.add_arguments(names.add_parser(name, help=module.__doc__.partition("\n")[0], description=module.__doc__))
    for sub in names.choices.values():
        sub.add_argument("--out", type=Path, help="write the JSON here as well")
    options = vars(parser.parse_args(arguments))
    name, out = options.pop("name"), options.pop("out")
    if out is not None and not out.resolve().parent.is_dir():
        parser.error(f"--out {out}: no such directory")
    if name == "gpu":  # it writes rows as they come, since a device may be lent for minutes
        options["keep"] = out
    result = BENCHMARKS[name].run(**options)
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(result["verdict"], file=sys.stderr)
    return 0 if result["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())
