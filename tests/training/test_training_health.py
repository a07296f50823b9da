"""What a run says of equilibria that are not solved: with the step, and again when it goes on."""

from types import SimpleNamespace

import torch

from implicit_attention.training.health import Health


def outputs(unconverged, gain):
    return SimpleNamespace(solver_stats=SimpleNamespace(
        steps=torch.tensor([3.0]), residual=torch.tensor([1e-2]), unconverged=torch.tensor([unconverged]),
        gain=torch.tensor([gain]),
    ))  # fmt: skip


def test_what_goes_wrong_is_said_again_with_its_count():
    health, said = Health(), {}
    for step in range(1, 121):
        health.add(outputs(0.25, 0.5 if step < 100 else 0.99))
        for sentence in health.warnings(health.figures(), step):
            said.setdefault(step, []).append(sentence)
    assert sorted(said) == [1, 10, 100, 109]
    assert said[1][0].startswith("step 1: up to 25.00% of a layer's rows missed the solver's tolerance")
    assert said[10][0].startswith("step 10: ")
    assert said[10][0].endswith("(10 log entries so far.)")
    assert len(said[100]) == 2
    assert "largest gain" in said[100][1]
    assert "(10 log entries so far.)" in said[109][0]


def test_a_healthy_run_is_silent():
    health = Health()
    health.add(outputs(0.0, 0.5))
    assert health.warnings(health.figures(), 1) == []
