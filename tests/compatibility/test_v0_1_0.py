"""What 0.1.0 (commit 4fc9666) made still works: names, layers, models, a run cut off half-way, records of studies.

The files in `v0.1.0` were written by that commit; nothing here writes them.
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

import implicit_attention
from implicit_attention import ImplicitQueryAttention, ImplicitQueryAttentionLinearV, hf
from implicit_attention.cli.app import app
from studies import records
from tests.training.small_run import curve, kept_history

HERE = Path(__file__).parent / "v0.1.0"
NAMES = json.loads((HERE / "names.json").read_text())
ROOT = Path(__file__).parents[2]
# The harness of the studies left the package; C++ took the place of numba's engine.
LEFT = ("implicit_attention.experiments", "implicit_attention.native", "implicit_attention.cli.evaluation")
LAYERS = sorted(path.stem.partition("-")[2] for path in HERE.glob("layer-*.safetensors"))


@pytest.mark.parametrize("module", ["implicit_attention", "implicit_attention.hf"])
def test_public_names_can_be_imported(module):
    found = importlib.import_module(module)
    assert not [name for name in NAMES[module] if not hasattr(found, name)]


@pytest.mark.parametrize("name", [name for name in NAMES["modules"] if not name.startswith(LEFT)])
def test_modules_can_be_imported_under_their_old_names(name):
    if ".triton" in name:
        pytest.importorskip("triton")
    before = implicit_attention.fixed_point
    importlib.import_module(name)
    assert implicit_attention.fixed_point is before, "the function, not the module that it was in"


def test_old_and_new_names_are_the_same_objects():
    old = importlib.import_module("implicit_attention.solvers.anderson")
    assert old.Anderson is implicit_attention.Anderson
    old = importlib.import_module("implicit_attention.fixed_point")
    assert old.fixed_point is implicit_attention.fixed_point
    assert isinstance(ImplicitQueryAttention(4)._report, old.FailureReport)
    assert importlib.import_module("implicit_attention.kernels.flash").__spec__.name.endswith("flash_cpu")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_loads_and_gives_what_it_gave(name):
    path = HERE / f"layer-{name}.safetensors"
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["options"])
    tensors = load_file(path)
    layer = ImplicitQueryAttention(16, 4, **options).eval()
    layer.load_state_dict({key[6:]: t for key, t in tensors.items() if key.startswith("state.")})
    tolerance = max(layer.solver.tolerances(torch.float32))
    torch.testing.assert_close(layer(tensors["x"]), tensors["y"], rtol=10 * tolerance, atol=10 * tolerance)


def test_the_seed_gives_the_same_bits():
    tensors = load_file(HERE / "seed.safetensors")
    layer = ImplicitQueryAttentionLinearV(8)
    layer.load_state_dict({key[6:]: t for key, t in tensors.items() if key.startswith("state.")})
    torch.testing.assert_close(layer(tensors["x"]), tensors["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The equilibrium was not solved")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("causal", hf.ImplicitAttentionForCausalLM),
        ("mixed", hf.ImplicitAttentionForCausalLM),
        ("masked", hf.ImplicitAttentionForMaskedLM),
        ("classifier", hf.ImplicitAttentionForSequenceClassification),
    ],
)
def test_a_model_loads_and_gives_what_it_gave(name, kind):
    expected = load_file(HERE / f"hf-{name}" / "expected.safetensors")
    model = kind.from_pretrained(HERE / f"hf-{name}").eval()
    tokens = expected["tokens"]
    with torch.no_grad():
        logits = model(tokens, torch.ones_like(tokens)).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-3, atol=1e-3)
    assert AutoConfig.from_pretrained(HERE / f"hf-{name}") is not None
    assert AutoModel.from_pretrained(HERE / f"hf-{name}") is not None


def test_a_run_that_was_cut_off_goes_on_as_it_would_have(tmp_path):
    shutil.copytree(HERE / "run", tmp_path / "run")
    settings = tmp_path / "run" / "checkpoint-4" / "run.json"
    settings.write_text(settings.read_text().replace('"text"', json.dumps(str(HERE / "text"))))
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    expected = curve(json.loads((HERE / "run-history.json").read_text())["log_history"])
    found = curve(kept_history(tmp_path / "run"))
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "eval_loss"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_committed_records_can_be_read():
    found = records.load(ROOT / "docs" / "data" / "eval")
    (before,) = records.load(HERE / "eval")["recall-64"]["implicit"]
    assert before["solved_at"] == 125
    assert found
    found["of this version"] = {"implicit": [before]}
    for record in (record for rows in found.values() for runs in rows.values() for record in runs):
        overflowed = any(kind.get("accuracy", 0.0) is None for kind in record["scores"].values())
        assert record["score"] is not None or record["end"] != "steps" or overflowed
