"""The table of what boards are predicted to do."""

from bench import boards


def test_a_model_without_weights_is_enough_for_a_plan(tmp_path):
    model = boards.write_shape("small", tmp_path / "small.m")
    assert float(boards.cell(model, "pi4", 1)) > 0
    assert boards.cell(model, "pi4", 2).endswith(" (with 1)")  # a message takes longer than all of its weights
