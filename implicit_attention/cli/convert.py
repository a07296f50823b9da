"""`implicit-attention convert`: a trained decoder becomes one with implicit blocks, with the same outputs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from implicit_attention.cli.faults import one_line, terminable
from implicit_attention.training.faults import RunError, unwritable

_AUTO = "auto"
SELF_QUERIES, VALUES = ("input", "output"), ("linear", "feedback")
DTYPES = (_AUTO, "float32", "bfloat16", "float16")


def _one_of(choices: tuple[str, ...]) -> str:
    return "|".join(choices)


def convert(
    model: Annotated[Path, typer.Option(help="Directory of the trained model, or its file in GGUF format.")],
    out: Annotated[Path, typer.Option(help="Directory for the converted model. It must not exist.")],
    layers: Annotated[
        str, typer.Option(help='Which layers become implicit: "all", "none", or such as 0,4,8-16, counted from 0.')
    ] = "all",
    self_query: Annotated[
        str,
        typer.Option(
            help="What a token's own query is made from. With [bold]input[/bold] the equilibrium is always unique; "
            "with [bold]output[/bold] a token's own query is made from its output too.",
            metavar=_one_of(SELF_QUERIES),
        ),
    ] = "input",
    values: Annotated[
        str,
        typer.Option(
            help="What values are made from. With [bold]feedback[/bold] later tokens see the outputs too, by a map "
            "that is zero at first.",
            metavar=_one_of(VALUES),
        ),
    ] = "linear",
    dtype: Annotated[
        str, typer.Option(help="Of the weights; auto: as they were saved.", metavar=_one_of(DTYPES))
    ] = _AUTO,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.", metavar="SIZE")] = "5GB",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="How far outputs may differ, as a part of the largest. "
            + escape("[default: 1e-5; 0.05 in half precision]"),
            metavar="PART",
        ),
    ] = None,
) -> None:
    """Convert a trained decoder of transformers: its layers become implicit, and its outputs stay the same.

    Works for Llama, Mistral, Qwen2, Qwen3, SmolLM3 and Granite. An implicit layer with Omega_Q = 0 is ordinary
    attention, so nothing changes until Omega_Q is trained. The outputs of both models are compared on a few tokens, and
    the largest difference is printed.

    [bold]implicit-attention convert --model DIR --layers 8-16 --out NEW[/bold]

    Then, in Python: [bold]import implicit_attention.hf[/bold], and load NEW with transformers'
    AutoModelForCausalLM.from_pretrained. The tokenizer is copied too. The trained model is only read.
    """
    with one_line("convert"):
        _check("self-query", self_query, SELF_QUERIES)
        _check("values", values, VALUES)
        _check("dtype", dtype, DTYPES)
        from implicit_attention.hf.conversion import converted, files

        with _explained(out), terminable():
            files.check_out(out, model)
            files.check_size(max_shard_size)
            found = converted(
                model, layers, self_query=self_query, values=values, dtype=dtype, tolerance=tolerance, say=_say
            )
            _say(f"Writing {out}.")
            files.write(found.model, model, out, max_shard_size)
        print(
            f"{out}: {len(found.layers)} of {found.model.config.num_hidden_layers} layers are implicit; the largest "
            f"difference of a logit is {found.difference:.2g}, and the largest logit is {found.largest:.3g}"
        )


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn what can go wrong into one line."""
    from implicit_attention.hf.conversion import ConversionError

    try:
        yield
    except ConversionError as error:
        raise RunError(str(error)) from None
    except OSError as error:
        raise unwritable("--out", out, error) from None


def _check(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RunError(f"--{flag}: must be one of {', '.join(choices)}, but is {value}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)
