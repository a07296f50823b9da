"""The benchmark of a small language model, at its smallest."""

from benchmarks import language_model, page


def test_both_models_are_trained_timed_and_told():
    small = {"length": 64, "embed_dim": 8, "layers": 1, "heads": 1, "batch_size": 64}
    result = language_model.run(seeds=(0,), steps=2, repeats=1, threads=1, settings=small)
    assert result["correct"]
    assert {run["arm"] for run in result["runs"]} == set(language_model.ARMS)
    assert all(0.0 < run["bits_per_byte"] < 20.0 for run in result["runs"])
    assert result["step"]["ratio"] > 0.0
    assert f"{result['step']['ratio']:.2f}" in page.training_figures(result)
