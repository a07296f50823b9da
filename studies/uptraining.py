"""`python -m studies.uptraining`: what training on does to a converted model, and to an ordinary one.

Every arm is a run of `implicit-attention train --from`. All arms of a seed see the same windows in the same order. The
first seed tries all learning rates of an arm; the others have the best of them. A record of each finished run,
OUT/ARM/rate-R-seed-N.json, holds the held-out loss by tokens; the same command goes on with the runs that are missing,
and at the end prints the table and writes OUT/uptraining.md and OUT/uptraining.png.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from implicit_attention.cli.environment import environment
from implicit_attention.cli.faults import one_line
from implicit_attention.training.faults import RunError
from studies import records, uptraining_report
from studies.commit import checked_out
from studies.run import Record

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def arms(count: int, few: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return what each arm sets, by its name.

    Args:
        count: How many layers the model has.
        few: Some of them.
    """
    one, some = str(few[len(few) // 2]), ",".join(map(str, few))
    lora = {"train": "lora", "layers": "none"}
    return {
        "one": {"layers": one},
        "few": {"layers": some},
        "all": {"layers": "all"},
        "few-feedback": {"layers": some, "values": "feedback"},
        "few-output": {"layers": some, "self_query": "output"},
        "few-lora": {"layers": some, "train": "lora"},
        "lora-one": {**lora, "like": 1},
        "lora-few": {**lora, "like": len(few)},
        "lora-twice-few": {**lora, "like": 2 * len(few)},
        "lora-all": {**lora, "like": count},
        "everything": {"layers": "none", "train": "all"},
        "few-everything": {"layers": some, "train": "all"},
    }


@app.command()
def uptrain(
    model: Annotated[str, typer.Option(help="Model to train on; {seed} in it stands for the seed.")],
    out: Annotated[Path, typer.Option(help="Directory for records, table and curve.")],
    few: Annotated[str, typer.Option(help="The layers of the arms named few, such as 6,12,18.")],
    arm: Annotated[list[str] | None, typer.Option(help=escape("An arm; can be repeated. [default: all]"))] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1)] = 200,
    length: Annotated[int, typer.Option(min=2)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    rates: Annotated[str, typer.Option(help="Learning rates to choose from, of all weights that learn.")] = "1e-3",
    windows: Annotated[int, typer.Option(min=1, help="Held-out sequences to measure on.")] = 128,
    data: Annotated[str, typer.Option(help="As in implicit-attention train.")] = "default",
    probe: Annotated[bool, typer.Option(help="Also measure recall in context after it.")] = True,
) -> None:
    """Compare implicit layers with low-rank changes of as many weights, from the same trained model."""
    with one_line("uptraining"):
        settings = {
            "steps": steps, "length": length, "batch_size": batch_size, "data": data, "warmup": max(1, steps // 10),
            "eval_every": max(1, steps // 4), "save_every": steps, "keep": 1, "device": "cpu", "eval_windows": windows,
            "final_windows": windows,
        }  # fmt: skip
        numbers, tried = _integers("--seeds", seeds), _rates(rates)
        count = _layers(model.format(seed=numbers[0]))
        known = arms(count, _integers("--few", few))
        wanted = arm or list(known)
        for name in wanted:
            if name not in known:
                raise RunError(f"--arm: must be one of {', '.join(known)}, but is {name}")
        for name in wanted:
            best = tried
            for seed in numbers:
                chosen = {**settings, **known[name], "source": model.format(seed=seed), "seed": seed}
                found = {rate: _finished(out, name, {**chosen, "rate": rate}, probe) for rate in best}
                best = [min(found, key=lambda rate: found[rate]["curve"][-1][1])]
        report(out)


def _integers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"{flag}: must be integers such as 0,1,2, but is {text}") from None


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise RunError(f"--rates: must be positive numbers such as 3e-4,1e-3, but is {text}")
    return rates


def _layers(model: str) -> int:
    from implicit_attention.hf.conversion.convert import read_config

    return int(read_config(model).num_hidden_layers)


def _finished(out: Path, arm: str, settings: dict[str, Any], probe: bool) -> Record:
    """The record of a run, which is made unless it is there."""
    name = f"rate-{settings['rate']:g}-seed-{settings['seed']}"
    file = out / arm / f"{name}.json"
    if file.exists():
        record = records.read(file)
        if record["settings"] != json.loads(json.dumps(_told(settings))) or (probe and record["recall"] is None):
            raise RunError(
                f"--out: {file} is of a run with other settings or without the probe: remove it, or choose another "
                "directory"
            )
        return record
    print(f"{arm}, rate {settings['rate']:g}, seed {settings['seed']}", file=sys.stderr)
    records.write(file, _record(out / arm / f"run-{name}", settings, probe))
    return records.read(file)


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a record has them: with the model's name, wherever it lies."""
    return {**settings, "source": Path(settings["source"]).name}


def _record(directory: Path, settings: dict[str, Any], probe: bool) -> Record:
    from implicit_attention.hf import convert
    from implicit_attention.hf.conversion.convert import read_config
    from implicit_attention.training import run, uptraining
    from studies.recall_probe import measure

    shutil.rmtree(directory, ignore_errors=True)  # of a run that was stopped
    flags = {name: value for name, value in settings.items() if name not in ("like", "rate")} | {"out": str(directory)}
    if settings.get("train", "query-map") != "query-map":
        flags["learning_rate"] = settings["rate"]
    if settings.get("layers") != "none":
        flags["map_rate"] = settings["rate"]
    if "like" in settings:
        flags["lora_weights"] = settings["like"] * uptraining.query_map_weights(read_config(settings["source"]))
    plan = run.plan(flags, {}, resume=False)
    directory.mkdir(parents=True)
    result = run.run(plan, say=lambda sentence: print(f"  {sentence}", file=sys.stderr))
    assert result is not None
    curve = [(entry["step"], entry["eval_loss"]) for entry in result.history if "eval_loss" in entry]
    worst = [max((e.get(name, 0.0) for e in result.history), default=0.0) for name in ("unconverged", "residual")]
    recall = None
    if probe:
        places = {"before": convert(settings["source"], layers="none"), "after": _trained(directory)}
        recall = {when: measure(model, seed=settings["seed"]) for when, model in places.items()}
    found = {
        "settings": _told(settings),
        "trained": result.learning,
        "tokens": settings["batch_size"] * settings["length"],
        "curve": curve,
        "final": next(entry["final_loss"] for entry in result.history if "final_loss" in entry),
        "unconverged": worst[0],
        "residual": worst[1],
        "recall": recall,
        "result": {**asdict(result), "history": None, "out": None},
        "commit": checked_out(),
        **environment(),
    }
    shutil.rmtree(directory)
    return found


def _trained(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def report(out: Path) -> None:
    """Print the table of all records in a directory, and write it with the curve.

    Args:
        out: The directory.
    """
    from implicit_attention.cli import output

    found = uptraining_report.load(out)
    text = uptraining_report.table(found)
    print(text)
    output.write(out / "uptraining.md", text + "\n")
    output.write_figure(out / "uptraining.png", uptraining_report.figure({"": found}))


if __name__ == "__main__":
    app(prog_name="python -m studies.uptraining")
