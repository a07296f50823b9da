"""The cost of a layer without a mask: outputs are checked before times are told."""

from benchmarks import encoder


def test_times_stand_beside_bounds_and_evaluations(monkeypatch):
    monkeypatch.setattr(encoder, "SHAPES", ((2, 9),))
    monkeypatch.setattr(encoder, "TARGETS", (1e9,))
    result = encoder.run(embed_dim=16, num_heads=2, repeats=2)
    assert result["correct"]
    assert [row["weights"] for row in result["rows"]] == ["new", "sharp"]
    for row in result["rows"]:
        assert row["time_ratio"] > 0
        assert row["radius"] < 0.9
        assert row["evaluations"] >= 2
    new, sharp = (row["bound"] for row in result["rows"])
    assert sharp > 10 * new
    assert result["verdict"] == "2 of 2 targets hold."


def test_wrong_outputs_are_told(monkeypatch):
    monkeypatch.setattr(encoder, "SHAPES", ((2, 9),))
    monkeypatch.setattr(encoder, "TARGETS", (1e9,))
    monkeypatch.setattr(encoder, "within", lambda layer, x: False)
    result = encoder.run(embed_dim=16, num_heads=2, repeats=1)
    assert not result["correct"]
    assert result["verdict"] == "WRONG outputs."
