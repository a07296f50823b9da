"""docs/causal.md, the figures of other pages and of README.md, and pictures: `python -m benchmarks.page`.

Tables and pictures are made from docs/data, so that they cannot disagree with what was measured.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import layers_page
from benchmarks.peers import CONTESTANTS
from benchmarks.readme import between
from benchmarks.report import PASSES, origin
from studies import uptraining_report
from studies.cells import markdown

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
TITLES = {
    "layer": "Whole layers",
    "layer-xeon": "Whole layers on another processor",
    "causal": "The solve: time and memory",
    "decode": "Decoding",
    "hard": "Hard weights",
    "feedback": "Values that read outputs",
    "encoder": "Without a mask",
}
OF_PAGES = ("language_model", "conversion", "contraction")  # shown on other pages
LAYERS_HEAD = ["whole layer, tolerance of its own", "forward", "forward + backward", "first call, both"]
MODELS = {"small": "Four layers of width 128, on bytes", "smollm2": "SmolLM2-135M-Instruct, in its own tokens"}
HELD = {True: "holds", False: "**missed**"}
Result = dict[str, Any]


def load() -> dict[str, Result]:
    """What has been measured, by benchmark."""
    paths = {name: DOCS / "data" / f"{name}.json" for name in (*TITLES, *OF_PAGES)}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def load_uptrained() -> dict[str, uptraining_report.Records]:
    """The runs that trained models on, by the model's title."""
    found = {title: uptraining_report.load(DOCS / "data" / "uptraining" / name) for name, title in MODELS.items()}
    return {title: records for title, records in found.items() if records}


def page(results: dict[str, Result]) -> str:
    """The whole page."""
    parts = [
        "# What an equilibrium costs",
        "<!-- Made by `python -m benchmarks.page` from docs/data/*.json: measure again and make it anew. -->",
        "Options that are not named have their defaults. All contestants run in turn in one process, and figures are "
        "medians. Whole layers come first: that is what a user pays. The solve alone is counted in attention passes.",
    ]
    for name, title in TITLES.items():
        parts += [f"## {title}", *section(name, results.get(name))]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def wrapped(part: str) -> str:
    """Prose in lines of 120, with code in one piece; tables and lists as they are."""
    if part.startswith(("|", "-", "!", "<", "#")):
        return part
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), part)
    return textwrap.fill(whole, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def section(name: str, result: Result | None) -> list[str]:
    if result is None:
        return ["Not measured yet."]
    if not result["correct"]:
        return [machine(result), result["verdict"]]
    makers = {
        "layer": layers_page.whole,
        "layer-xeon": layers_page.whole,
        "causal": causal_section,
        "decode": decode_section,
        "hard": hard_section,
        "feedback": layers_page.feedback,
        "encoder": layers_page.encoder,
    }
    return [machine(result), *makers[name](result), *target_list(result)]


def causal_section(result: Result) -> list[str]:
    parts = [
        "Under a causal mask, `ForwardSubstitution` solves the equation block by block. It computes attention between "
        "blocks once. Times and memory are ratios to "
        "`torch.nn.functional.scaled_dot_product_attention(is_causal=True)` (SDPA) on the same shapes. All get the "
        "same keys and values; making queries from the output is part of the work.",
        "![Time and memory against the number of tokens](images/causal.png)",
    ]
    head = ["contestant", "forward", "forward + backward", "memory, forward", "memory, both", "first call, both"]
    head.append("largest residual")
    for shape in result["shapes"]:
        parts.append(f"**N = {shape['length']}, batch {shape['batch']}** (medians of {shape['repeats']})")
        parts.append(markdown([head, *(causal_row(name, row) for name, row in shape["rows"].items())]))
        parts += [f"Not run: {CONTESTANTS[name].label}; {why}." for name, why in shape["left_out"].items()]
        if shape.get("layers"):
            parts.append(markdown([LAYERS_HEAD, *(layer_row(name, row) for name, row in shape["layers"].items())]))
        if "memory_by_tolerance" in shape:
            parts.append(tolerance_sentence(shape["memory_by_tolerance"]))
    parts += [f"Not run: {CONTESTANTS[name].label}; {why}" for name, why in result["absent"].items()]
    parts.append(
        f"Tolerance {result['tolerance']:g}. *Forward* runs without autograd. *Forward + backward* takes a random "
        "cotangent and returns the gradients of keys, values and Omega_Q (for SDPA: of q, k, v). *Memory* is the peak "
        "of what tensors hold, less what they held before the pass. The *largest residual* is that of any component of "
        "any row. It is measured outside the contestant, in float64, and is **bold** where the tolerance t is missed: "
        "a row by more than t plus t times its largest component, and a sample in norm, which torchdeq stops by. "
        "*Once*: the "
        f"pass takes more than {result['slow_seconds']:g} seconds and was measured once. Before timing, outputs and "
        f"gradients were checked against float64 at N = {result['gate']['shape'][1]}."
    )
    return parts


def causal_row(name: str, row: Result) -> list[str]:
    times = [f"{row[p]['time_ratio']:.2f}" + (" (once)" if row[p]["once_because_slow"] else "") for p in PASSES]
    memory = [f"{row[p]['memory_ratio']:.2f}" for p in PASSES]
    residual = f"{row['largest_residual']:.1e}" if "largest_residual" in row else ""
    if not row.get("reached_tolerance", True):
        residual = f"**{residual}**"
    first = row["forward_backward"].get("first_call_seconds")
    return [CONTESTANTS[name].label, *times, *memory, "" if first is None else f"{first:.2f} s", residual]


def layer_row(name: str, row: Result) -> list[str]:
    """A whole layer, as times an ordinary one."""
    return [name, *(f"{row[p]['time_ratio']:.2f}" for p in PASSES), f"{row['first_call_seconds']:.2f} s"]


def tolerance_sentence(figures: dict[str, dict[str, int]]) -> str:
    listed = ", ".join(f"{b['forward_backward'] / 2**20:.1f} MiB at {tolerance}" for tolerance, b in figures.items())
    return f"Memory of the equilibrium, forward + backward, by tolerance: {listed}."


def decode_section(result: Result) -> list[str]:
    head = ["one step", "milliseconds", "of SDPA's", "of an attention layer's"]
    rows = [
        [name, f"{1e3 * r['median_seconds']:.2f}", f"{r['ratio_to_sdpa']:.2f}", f"{r['ratio_to_attention_layer']:.2f}"]
        for name, r in result["rows"].items()
    ]
    text = (
        f"A decode step: one new token for each of {result['batch']} samples, after {result['context']} tokens. "
        f"Medians of {result['repeats']}, tolerance {result['tolerance']:g}. The solve without projections is a "
        "difference: the time of `layer.solve` less that of the projections alone, round by round."
    )
    return [text, markdown([head, *rows])]


def hard_section(result: Result) -> list[str]:
    parts = [
        "Here the scores have a large standard deviation. It comes from the temperature (with `qk_norm`) or from the "
        "weights of keys and queries (without). *Picard* is the residual of plain iteration after "
        f"{result['picard_steps']} steps. Times are relative to those with random weights. Residuals are the largest "
        "of any row, measured outside the library by one application of the map in the same dtype. *Flagged* counts "
        "rows that the library reports as not solved, in either dtype. *Reported* is what the timed passes reported, "
        "gradients included."
    ]
    head = ["weights", "scores' std", "Picard", "forward", "forward + backward"]
    head += [f"residual, {dtype}" for dtype in ("float32", "float64")] + ["flagged", "reported"]
    for setting in result["settings"]:
        norm = "with" if setting["qk_norm"] else "without"
        parts.append(f"**N = {setting['length']}, batch {setting['batch']}, {norm} `qk_norm`**")
        parts.append(markdown([head, *(hard_row(name, row) for name, row in setting["rows"].items())]))
    return parts + [sweep_sentence(dtype, swept) for dtype, swept in result["sweep"].items()]


def hard_row(name: str, row: Result) -> list[str]:
    times = [f"{row[p]['time_ratio']:.2f}" for p in PASSES]
    residuals = [f"{row['residuals'][dtype]['largest_residual']:.1e}" for dtype in ("float32", "float64")]
    flagged = sum(figures["flagged"] for figures in row["residuals"].values())
    said = ", ".join(f"{what}: {count}" for what, count in row["reported"].items()) or "nothing"
    return [name, f"{row['score_std']:.2f}", f"{row['picard_residual']:.1e}", *times, *residuals, str(flagged), said]


def sweep_sentence(dtype: str, swept: Result) -> str:
    values = {key: sorted({cell[key] for cell in swept["cells"]}) for key in ("scale", "num_heads", "length")}
    listed = {key: ", ".join(f"{v:g}" for v in found) for key, found in values.items()}
    return (
        f"{', '.join(swept['scaled'])} scaled by {listed['scale']}; {listed['num_heads']} heads; {listed['length']} "
        f"tokens; embed {swept['embed_dim']}, {swept['seeds']} seeds of each, {dtype}, tolerance "
        f"{swept['tolerance']:g}: of {swept['rows']} rows {swept['flagged']} were reported as failed, and "
        f"{swept['silent_failures']} were above tolerance without a report."
    )


def training_page(text: str, result: Result | None) -> str:
    """docs/training.md with its figures made anew."""
    return between(text, "figures", training_figures(result))


def conversion_page(text: str, result: Result | None, uptrained: dict[str, uptraining_report.Records]) -> str:
    """docs/convert.md with its figures made anew."""
    return between(between(text, "figures", conversion_figures(result)), "uptraining", uptraining_figures(uptrained))


def uptraining_figures(models: dict[str, uptraining_report.Records]) -> str:
    """The part of docs/convert.md on training on, from the records of `python -m studies.uptraining`."""
    if not models:
        return "Not measured yet."
    parts = []
    for title, found in models.items():
        run = next(iter(found.values()))[0]
        settings, commits = run["settings"], {r["commit"] for runs in found.values() for r in runs}
        made = ", ".join(sorted(commit[:7] for commit in commits if commit)) or "unknown"
        parts += [
            f"**{title}**: {settings['steps']} steps of {settings['batch_size']} x {settings['length']} tokens, "
            f"held-out loss in nats per token on {settings['eval_windows']} windows. Made by commit {made}.",
            uptraining_report.table(found),
            uptraining_report.by_tokens(found),
        ]
    return "\n\n".join([*(wrapped(part) for part in parts), "![Change of the held-out loss](images/uptraining.png)"])


def conversion_figures(result: Result | None) -> str:
    """The part of docs/convert.md that was measured."""
    if result is None or not result["correct"]:
        return "Not measured yet." if result is None else result["verdict"]
    check, conversion = result["check"], result["conversion"]
    trained, converted = (f"{check['loss'][name]:.5f}" for name in ("trained", "converted"))
    rows = [
        ["largest difference of a logit", "", f"{check['difference']:.1e} (largest logit: {check['largest']:.1f})"],
        [f"loss on 2 x {result['tokens']} tokens, nats per token", trained, converted],
        [f"greedy continuations by {check['continued']} tokens that agree", "",
         f"{check['equal']} of {check['prompts']}"],
        [f"prefill of {result['tokens']} tokens, as times the trained model", "1", f"{result['prefill']['ratio']:.2f}"],
        [f"a token after {result['tokens']}, as times the trained model", "1", f"{result['token']['ratio']:.2f}"],
        ["conversion, the model loaded: processor time", "", f"{conversion['processor_seconds']:.1f} s"],
        ["the command `convert`: peak memory above its imports", "",
         f"{conversion['peak_mb']:.0f} MB (weights: {conversion['weights_mb']:.0f} MB)"],
    ]  # fmt: skip
    what = f'{result["model"]}, {result["layers"]} layers, all converted, `self_query="input"`.'
    parts = [what, machine(result), markdown([["what", "trained", "converted"], *rows]), *target_list(result)]
    return "\n\n".join(wrapped(part) for part in parts)


def training_figures(result: Result | None) -> str:
    """The part of docs/training.md that was measured."""
    if result is None or not result["correct"]:
        return "Not measured yet." if result is None else result["verdict"]
    runs, settings = result["runs"], result["runs"][0]["settings"]
    head = ["seed", "ordinary", "implicit", "rows above tolerance"]
    by_seed = {seed: {r["arm"]: r for r in runs if r["seed"] == seed} for seed in (r["seed"] for r in runs)}
    rows = [
        [str(seed), *(f"{arms[a]['bits_per_byte']:.3f}" for a in ("ordinary", "implicit")),
         f"{arms['implicit']['unconverged']:.2g}"]
        for seed, arms in by_seed.items()
    ]  # fmt: skip
    parts = [
        f"Bits per byte of held-out text after {settings['steps']} steps of `--preset tiny` (one block, "
        f"{settings['batch_size']} sequences of {settings['length']} bytes in a step, {runs[0]['parameters']:,} "
        f"weights in either model), on {runs[0]['held_out_bytes']:,} bytes:",
        markdown([head, *rows]),
        "![Held-out bits per byte while the two models learn](images/language_model.png)",
        "What that costs, run in turn in one process:",
        markdown([["median milliseconds", "ordinary", "implicit", "ratio"], *cost_rows(result)]),
        machine(result),
        *target_list(result),
    ]
    return "\n\n".join(wrapped(part) for part in parts)


def cost_rows(result: Result) -> list[list[str]]:
    costs = {"training step": result["step"]}
    costs |= {f"generated byte, batch {batch}": figures for batch, figures in result["token"].items()}
    return [
        [what, *(f"{1e3 * c['rows'][a]['median_seconds']:.2f}" for a in ("ordinary", "implicit")), f"{c['ratio']:.2f}"]
        for what, c in costs.items()
    ]


def target_list(result: Result) -> list[str]:
    lines = [
        f"- {t['what']}: {t['measured']:.3g}, target at most {t['at_most']:.3g}, {HELD[t['holds']]}"
        for t in result.get("targets", ())
    ]
    return ["\n".join(lines)] if lines else []


def machine(result: Result) -> str:
    versions = result["versions"]
    extra = f", torchdeq {versions['torchdeq']}" if versions.get("torchdeq") else ""
    sizes = f", embed {result['embed_dim']}, {result['num_heads']} heads" if "embed_dim" in result else ""
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return (
        f"Measured on {result['processor']}, {threads}, {result['system']}, PyTorch "
        f"{versions['torch']}{extra}; {result['dtype']}{sizes}. "
        f"`python -m benchmarks {result['benchmark']}`. {origin(result)}"
    )


def main() -> None:
    """Write the pages and the pictures."""
    from benchmarks import choosing, plotting, readme
    from studies import records

    results = load()
    (DOCS / "causal.md").write_text(page(results), encoding="utf-8")
    if results.get("causal", {}).get("correct"):
        plotting.figure(results["causal"]).savefig(DOCS / "images" / "causal.png")
    convert = DOCS / "convert.md"
    uptrained = load_uptrained()
    text = conversion_page(convert.read_text(encoding="utf-8"), results.get("conversion"), uptrained)
    convert.write_text(text, encoding="utf-8")
    if uptrained:
        uptraining_report.figure(uptrained).savefig(DOCS / "images" / "uptraining.png")
    training = DOCS / "training.md"
    found = results.get("language_model")
    training.write_text(training_page(training.read_text(encoding="utf-8"), found), encoding="utf-8")
    if found and found["correct"]:
        plotting.learning(found).savefig(DOCS / "images" / "language_model.png")
    learned = records.load(DOCS / "data" / "eval")
    README.write_text(
        readme.filled(README.read_text(encoding="utf-8"), results.get("layer"), results.get("layer-xeon"), learned),
        encoding="utf-8",
    )
    guide = DOCS / "choosing.md"
    guide.write_text(
        choosing.filled(guide.read_text(encoding="utf-8"), learned, results.get("contraction")), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
