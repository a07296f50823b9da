"""`python -m studies.uptraining`: what training on does to a converted model, and to an ordinary one.

Every arm is a run of `implicit-attention train --from`. All arms of a seed see the same windows in the same order. A
record of each finished run, OUT/ARM/seed-N.json, holds the held-out loss by tokens; the same command goes on with the
runs that are missing, and at the end prints the table and writes OUT/uptraining.md and OUT/uptraining.png.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from implicit_attention.cli.environment import environment
from implicit_attention.cli.faults import one_line
from implicit_attention.training.faults import RunError
from studies import records

Records = Mapping[str, Sequence[Mapping[str, Any]]]

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
    arm: Annotated[list[str] | None, typer.Option(help="An arm; can be repeated. [default: all]")] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1)] = 200,
    length: Annotated[int, typer.Option(min=2)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-4,
    map_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    windows: Annotated[int, typer.Option(min=1, help="Held-out sequences to measure on.")] = 128,
    data: Annotated[str, typer.Option(help="As in implicit-attention train.")] = "default",
    probe: Annotated[bool, typer.Option(help="Also measure recall in context after it.")] = True,
) -> None:
    """Compare implicit layers with low-rank changes of as many weights, from the same trained model."""
    with one_line("uptraining"):
        settings = {
            "steps": steps, "length": length, "batch_size": batch_size, "learning_rate": learning_rate,
            "map_rate": map_rate, "data": data, "warmup": max(1, steps // 10), "eval_every": max(1, steps // 4),
            "save_every": steps, "keep": 1, "device": "cpu", "eval_windows": windows, "final_windows": windows,
        }  # fmt: skip
        numbers = _integers("--seeds", seeds)
        count = _layers(model.format(seed=numbers[0]))
        known = arms(count, _integers("--few", few))
        wanted = arm or list(known)
        for name in wanted:
            if name not in known:
                raise RunError(f"--arm: must be one of {', '.join(known)}, but is {name}")
        for seed in numbers:
            for name in wanted:
                chosen = {**settings, **known[name], "source": model.format(seed=seed), "seed": seed}
                _finish(out, name, chosen, probe)
        report(out)


def _integers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"{flag}: must be integers such as 0,1,2, but is {text}") from None


def _layers(model: str) -> int:
    from implicit_attention.hf.conversion.convert import read_config

    return int(read_config(model).num_hidden_layers)


def _finish(out: Path, arm: str, settings: dict[str, Any], probe: bool) -> None:
    """Make a run unless its record is there."""
    file = out / arm / f"seed-{settings['seed']}.json"
    if file.exists():
        record = records.read(file)
        if record["settings"] != json.loads(json.dumps(settings)) or (probe and record["recall"] is None):
            raise RunError(
                f"--out: {file} is of a run with other settings or without the probe: remove it, or choose another "
                "directory"
            )
        return
    print(f"{arm}, seed {settings['seed']}", file=sys.stderr)
    records.write(file, _record(out / arm / f"run-{settings['seed']}", settings, probe))


def _record(directory: Path, settings: dict[str, Any], probe: bool) -> dict[str, Any]:
    from implicit_attention.hf.conversion.convert import read_config
    from implicit_attention.training import run, uptraining
    from studies.recall_probe import measure

    shutil.rmtree(directory, ignore_errors=True)  # of a run that was stopped
    idle = {"like", "learning_rate" if settings.get("train", "query-map") == "query-map" else ""}
    idle |= {"map_rate"} if settings.get("layers") == "none" else set()
    flags = {name: value for name, value in settings.items() if name not in idle} | {"out": str(directory)}
    if "like" in settings:
        flags["lora_weights"] = settings["like"] * uptraining.query_map_weights(read_config(settings["source"]))
    plan = run.plan(flags, {}, resume=False)
    directory.mkdir(parents=True)
    result = run.run(plan, say=lambda sentence: print(f"  {sentence}", file=sys.stderr))
    assert result is not None
    curve = [(entry["step"], entry["eval_loss"]) for entry in result.history if "eval_loss" in entry]
    worst = [max((e.get(name, 0.0) for e in result.history), default=0.0) for name in ("unconverged", "residual")]
    found = {
        "settings": settings,
        "trained": result.learning,
        "tokens": settings["batch_size"] * settings["length"],
        "curve": curve,
        "final": next(entry["final_loss"] for entry in result.history if "final_loss" in entry),
        "unconverged": worst[0],
        "residual": worst[1],
        "recall": measure(directory, seed=settings["seed"]) if probe else None,
        "result": {**asdict(result), "history": None},
        **environment(),
    }
    shutil.rmtree(directory)
    return found


def report(out: Path) -> None:
    """Print the table of all records in a directory, and write it with the curve.

    Args:
        out: The directory.
    """
    from implicit_attention.cli import output

    found: dict[str, list[Mapping[str, Any]]] = {}
    for file in sorted(out.glob("*/seed-*.json")):
        found.setdefault(file.parent.name, []).append(records.read(file))
    text = table(found)
    print(text)
    output.write(out / "uptraining.md", text + "\n")
    output.write_figure(out / "uptraining.png", figure(found))


def table(found: Records) -> str:
    """Return the table in Markdown: the change of the held-out loss, mean and standard deviation over seeds.

    Args:
        found: The records of each arm.
    """
    lines = [
        "| arm | weights that learn | loss before | change at the end | seeds | recall near | recall far |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in sorted(found.items(), key=lambda item: statistics.mean(map(_change, item[1]))):
        changes = [_change(record) for record in runs]
        spread = f" ± {statistics.stdev(changes):.4f}" if len(changes) > 1 else ""
        recall = [
            " | ".join(f"{statistics.mean(r['recall'][place] for r in runs):.3f}" for place in ("near", "far"))
            if all(r["recall"] for r in runs)
            else " | "
        ]
        lines.append(
            f"| {arm} | {runs[0]['trained']:,} | {statistics.mean(r['curve'][0][1] for r in runs):.4f} "
            f"| {statistics.mean(changes):+.4f}{spread} | {len(runs)} | {recall[0]} |"
        )
    return "\n".join(lines)


def _change(record: Mapping[str, Any]) -> float:
    return float(record["curve"][-1][1] - record["curve"][0][1])


def figure(found: Records) -> Any:
    """Return the curve: change of the held-out loss against tokens, means over seeds.

    Args:
        found: The records of each arm.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = made.subplots()
    for arm, runs in found.items():
        steps = [step for step, _ in runs[0]["curve"]]
        changes = [statistics.mean(r["curve"][i][1] - r["curve"][0][1] for r in runs) for i in range(len(steps))]
        style = "--" if "lora" in arm else "-"
        axes.plot([step * runs[0]["tokens"] for step in steps], changes, style, label=arm)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="tokens", ylabel="change of the held-out loss, nats per token")
    axes.legend(frameon=False, fontsize=8)
    return made


if __name__ == "__main__":
    app(prog_name="python -m studies.uptraining")
