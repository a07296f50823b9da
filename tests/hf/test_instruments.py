"""Instruments for training: `solver_figures` of any model, and the callback of transformers' Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from implicit_attention import (
    ConvergenceWarning,
    ForwardSubstitution,
    ImplicitQueryAttention,
    Picard,
    diagnostics,
    solver_figures,
)
from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.hf.instruments import SolverCallback
from implicit_attention.inspection.instruments import advice

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")


def test_figures_are_those_of_the_last_solves():
    layer = ImplicitQueryAttention(8, 2, is_causal=True, solver=ForwardSubstitution(kernel="torch"))
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 8))
    assert solver_figures(model) == {}
    x = torch.randn(2, 5, 8)
    model(x).sum().backward()
    solution = layer.solve(x)
    figures = solver_figures(model, prefix="")
    assert figures == {
        "0/steps": float(solution.steps.max()), "0/residual": float(solution.residual.max()), "0/unconverged": 0.0,
    }  # fmt: skip
    model(x).sum().backward()
    assert solver_figures(model)["solver/0/adjoint_unconverged"] == 0.0
    layer.solve(x, gains=True)
    expected = float(diagnostics.row_gains(layer, x).detach().max())
    layer.solve(x, gains=True)
    assert solver_figures(layer)["solver/gain"] == pytest.approx(expected, rel=1e-5)
    assert advice(solver_figures(model)) == {}


def test_advice_names_the_layer():
    layer = ImplicitQueryAttention(8, is_causal=True, solver=Picard(max_steps=1), on_failure="ignore")
    layer(torch.randn(1, 5, 8))
    (sentence,) = advice(solver_figures(torch.nn.ModuleDict({"block": layer}))).values()
    assert sentence.startswith("solver/block: ")
    assert 'self_query="input"' in sentence
    said = advice({"solver/a/gain": 0.99, "solver/b/gain": 0.5, "solver/a/adjoint_unconverged": 0.25})
    assert list(said) == ["solver/a/gain", "solver/a/adjoint_unconverged"]
    assert "gain is 0.990" in said["solver/a/gain"]
    assert "25.00%" in said["solver/a/adjoint_unconverged"]


class Board(TrainerCallback):
    """In the place of TensorBoard and its like."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **others):
        self.entries.append(dict(logs))


def trainer(folder, **settings):
    config = ImplicitAttentionConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, output_gains=True,
        self_query="output", **settings,
    )  # fmt: skip
    rows = [{"input_ids": torch.randint(11, (6,)), "labels": torch.randint(11, (6,))} for _ in range(8)]
    args = TrainingArguments(
        str(folder), max_steps=4, logging_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(ImplicitAttentionForCausalLM(config), args, train_dataset=rows)


@pytest.mark.filterwarnings("ignore::implicit_attention.ConvergenceWarning")
def test_the_callback_reaches_every_board_and_writes_reports(tmp_path):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    train, board = trainer(tmp_path), Board()
    train.add_callback(board)
    SolverCallback.attach(train, sample=torch.randint(11, (1, 5)), report_every=2)
    train.train()
    logged = [entry for entry in board.entries if "loss" in entry]
    assert len(logged) == 4
    for i in range(2):
        names = {f"solver/model.layers.{i}.attention/{name}" for name in ("steps", "residual", "unconverged", "gain")}
        assert all(names <= set(entry) for entry in logged)
        assert names <= set(train.state.log_history[0])
    assert sorted(p.name for p in (tmp_path / "inspection").iterdir()) == ["step-2.html", "step-4.html"]
    assert train.model.training


@pytest.mark.filterwarnings("ignore::implicit_attention.ConvergenceWarning")
def test_the_callback_warns_with_advice(tmp_path):
    solver = {"name": "picard", "max_steps": 1}
    train = trainer(tmp_path, solver=solver, on_failure="ignore")
    SolverCallback.attach(train)
    with pytest.warns(
        ConvergenceWarning, match=r"step 1: solver/model\.layers\.0\.attention: .* Lower the learning rate"
    ):
        train.train()


def test_a_sample_needs_an_interval():
    with pytest.raises(ValueError, match="report_every"):
        SolverCallback(sample=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="report_every"):
        SolverCallback(sample=torch.zeros(1, 2), report_every=0)
