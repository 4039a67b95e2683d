import os
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.torch_pickle import Storage, View, read_state
from tests.converter.torch_files import integer, name, state_pickle, tensor_pickle, text

ONE = tensor_pickle("F16", "0", 6, 0, (2, 3), (3, 1))
ORDERED = name("collections", "OrderedDict")
NESTED = b")" + b"\x85" * 100_000  # a tuple in a tuple in a tuple, deeper than Python's stack


def test_a_tensor():
    expected = {"a": View(Storage("F16", "0", 6), 0, (2, 3), (3, 1))}
    assert read_state(state_pickle({"a": ONE})) == expected


def test_an_ordered_dictionary_with_the_versions_that_torch_adds():
    """As of a module's state_dict(): SETITEMS on an OrderedDict, then BUILD with {"_metadata": ...}."""
    metadata = b"}" + text("_metadata") + ORDERED + b")Rsb"
    data = b"\x80\x02" + ORDERED + b")R(" + text("a") + ONE + b"u" + metadata + b"."
    assert list(read_state(data)) == ["a"]


def test_a_parameter_is_its_tensor():
    parameter = name("torch._utils", "_rebuild_parameter") + b"(" + ONE + b"\x89" + ORDERED + b")RtR"
    assert read_state(state_pickle({"a": parameter})) == read_state(state_pickle({"a": ONE}))


def test_values_that_are_stored_once_and_fetched_again():
    data = b"\x80\x02}(" + text("a") + ONE + b"q\x05" + text("b") + b"h\x05u."
    state = read_state(data)
    assert state["a"] is state["b"]


class Harmful:
    """What a malicious checkpoint holds: loading it with pickle calls a function with arguments of its choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function, names", [(os.system, ("posix.system", "nt.system")), (eval, ("builtins.eval", "__builtin__.eval")),
                        (exec, ("builtins.exec", "__builtin__.exec")), (os.mkdir, ("posix.mkdir", "nt.mkdir"))]
)  # fmt: skip
def test_a_malicious_pickle_is_refused_and_nothing_is_run(tmp_path, protocol, function, names):
    made = tmp_path / "made"
    argument = {os.system: f"mkdir {made}", os.mkdir: str(made)}.get(function, f"__import__('os').mkdir({str(made)!r})")
    data = pickle.dumps({"weight": Harmful(function, argument)}, protocol)
    with pytest.raises(ValueError, match="refused: its pickle (asks for|uses)") as caught:
        read_state(data)
    if protocol >= 2:
        assert any(name in str(caught.value) for name in names) and "nothing was run" in str(caught.value)
    assert not made.exists()
    pickle.loads(data)
    assert made.exists()  # so it would have done harm


@pytest.mark.parametrize(
    "data, reason",
    [
        (name("posix", "system") + b".", "asks for posix.system"),
        (b"\x80\x04" + b"\x8c\x02os" + b"\x8c\x06system" + b"\x93.", "asks for os.system"),
        (name("torch", "load") + b".", "asks for torch.load"),
        (name("torch._utils", "_rebuild_tensor_v2.__globals__") + b".", "asks for torch._utils._rebuild"),
        (name("collections", "OrderedDict.fromkeys") + b".", "asks for collections.OrderedDict.fromkeys"),
        (b"(ios\nsystem\n.", "uses INST"),
        (b"\x80\x02}" + ORDERED + b")\x81.", "uses NEWOBJ"),
        (b"\x82\x01.", "uses EXT1"),
        (b"Pstorage\n.", "uses PERSID"),
        (b"I1\n.", "uses INT"),
        (ORDERED + b"(K\x01tR.", "makes no sense"),
        (name("torch", "FloatStorage") + b")R.", "makes no sense"),
        (ORDERED + b".", "holds no dictionary"),
        (b"}.", "holds no dictionary"),
        (b"].", "holds no dictionary"),
        (b"}(K\x01K\x02u.", "a dictionary in it has a key that is no text"),
        (b"}(" + NESTED + b"K\x02u.", "a key that is no text"),
        (NESTED + text("a") + b"\x93.", "makes no sense"),
        (text("a") + b"}\x93.", "makes no sense"),
        (ORDERED + NESTED + b"R.", "makes no sense"),
        (
            b"(" + NESTED + name("torch", "HalfStorage") + text("0") + text("cpu") + integer(1) + b"tQ.",
            "makes no sense",
        ),
        (b"}(" + text("model") + b"}u.", "entry model is not a tensor"),
        (b"}(]K\x02u.", "a key that is no text"),
        (b"}K\x01b.", "holds no dictionary"),
        (b"]K\x01b.", "makes no sense"),
        (b"}(K\x01u.", "makes no sense"),
        (b"K\x01u.", "makes no sense"),
        (b"h\x05.", "makes no sense"),
        (b".", "makes no sense"),
        (b"a.", "makes no sense"),
        (b"R.", "makes no sense"),
        (b"K\x01Q.", "makes no sense"),
        (b"", "cannot be parsed"),
        (b"}", "cannot be parsed"),
        (b"\xff", "cannot be parsed"),
        (b"X" + struct.pack("<I", 1 << 31) + b"a", "cannot be parsed"),
        (state_pickle({"a": tensor_pickle("F16", "0", 6, -1, (2, 3), (3, 1))}), "makes no sense"),
        (state_pickle({"a": tensor_pickle("F16", "0", -6, 0, (2, 3), (3, 1))}), "makes no sense"),
        (state_pickle({"a": tensor_pickle("F16", "0", 6, 0, (2, -3), (3, 1))}), "makes no sense"),
        (state_pickle({"a": tensor_pickle("F16", "0", 6, 0, (2, 3), (1,))}), "makes no sense"),
    ],
)
def test_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_state(data)


WORDS = [ONE, ORDERED, text("a"), integer(3), name("torch", "HalfStorage"), b"q\x01", b"h\x01"]
LETTERS = [bytes([letter]) for letter in b"(}])usaetRQbN\x85\x86\x87"]
pieces = st.lists(st.one_of(st.sampled_from(WORDS + LETTERS), st.binary(max_size=4)), max_size=14)


@given(pieces)
def test_any_bytes_give_tensors_or_a_value_error(parts):
    try:
        state = read_state(b"".join(parts) + b".")
    except ValueError:
        return
    assert all(type(key) is str and type(view) is View for key, view in state.items())
