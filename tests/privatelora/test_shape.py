import pytest

from dllama.privatelora.shape import AdapterShape
from dllama.targets import TARGETS, parse_targets
from tests.formats.models import config

MODEL = config()
SHAPE = AdapterShape.of(MODEL, 8, 4, ("q", "k", "v"))


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("o", "down"), tuple(TARGETS)])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_metadata_tell_all(targets, layers):
    shape = AdapterShape.of(MODEL, 8, 4, targets, layers)
    assert AdapterShape.from_metadata(shape.to_metadata()) == shape
    assert shape.mismatch(MODEL) is None


def test_matrices_have_the_widths_of_the_model():
    shape = AdapterShape.of(MODEL, 8, 4, tuple(TARGETS))
    assert shape.a("q") == (8, MODEL.dim) and shape.b("q") == (MODEL.q_dim, 4)
    assert shape.b("k") == shape.b("v") == (MODEL.kv_dim, 4)
    assert shape.a("o") == (8, MODEL.q_dim) and shape.b("o") == (MODEL.dim, 4)
    assert shape.a("gate") == shape.a("up") == (8, MODEL.dim) and shape.a("down") == (8, MODEL.hidden_dim)
    assert shape.m == (4, 8) and shape.n_trained == 32 * 7 * MODEL.n_layers


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n_layers": 3}, "for a model of 2 layers, and this one has 3"),
        ({"dim": 32}, "for a model whose width is 64, and it is 32 here"),
        ({"n_kv_heads": 4}, "for a model whose width of the keys is 48, and it is 96 here"),
    ],
)
def test_another_model_is_told(changes, said):
    assert SHAPE.mismatch(config(**changes)) == said


def test_a_width_that_no_target_has_does_not_matter():
    assert SHAPE.mismatch(config(hidden_dim=128)) is None
    shape = AdapterShape.of(MODEL, 8, 4, ("up",))
    assert shape.mismatch(config(hidden_dim=128)) == "for a model whose hidden width is 96, and it is 128 here"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("n_layers", None, "n_layers is missing"),
        ("n_layers", "1", "its layers are not those of a model of 1"),
        ("n_layers", "99999999", "n_layers is 99999999, not between"),
        ("r_c2d", "0", "r_c2d is 0, not between 1 and 8192"),
        ("r_d2c", "-8", "r_d2c is '-8', not a whole number"),
        ("dim", "\u00b2", "dim is '\u00b2', not a whole number"),
        ("dim", "9" * 5000, "not a whole number"),
        ("hidden_dim", "96", "which are not those of its targets"),
        ("kv_dim", None, "which are not those of its targets"),
        ("targets", "q k w", "w is no target"),
        ("targets", "q v k", "not in the order"),
        ("targets", "", "no target, or no layer"),
        ("layers", "", "no target, or no layer"),
        ("layers", "1 0", "its layers do not ascend"),
        ("layers", "0 0", "its layers do not ascend"),
        ("layers", "0 x", "layers is 'x'"),
    ],
)
def test_text_that_is_no_shape(name, text, said):
    metadata = SHAPE.to_metadata() | {name: text}
    with pytest.raises(ValueError, match=said):
        AdapterShape.from_metadata({name: text for name, text in metadata.items() if text is not None})


@pytest.mark.parametrize("text, said", [("q,x", "x is no target"), ("", "nothing is no target"), ("q,k,q", "q is")])
def test_targets_that_make_no_sense(text, said):
    with pytest.raises(ValueError, match=said):
        parse_targets(text)


def test_targets_are_put_in_order():
    assert parse_targets("v, q") == ("q", "v")
