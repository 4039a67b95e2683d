import pytest

from converter.values import epsilon, number, whole, whole_number


def test_whole_numbers():
    assert whole({"a": 3}, "a") == 3
    assert whole({"a": 3}, "a", 5) == 3
    assert whole({}, "a", 5) == whole({"a": None}, "a", 5) == 5
    for values, reason in (({}, "a is missing"), ({"a": None}, "a is missing"), ({"a": 3.0}, "a is 3.0, not a whole")):
        with pytest.raises(ValueError, match=reason):
            whole(values, "a")
    for wrong in (True, "3", [3], 1.5):
        with pytest.raises(ValueError, match="b is .*, not a whole number"):
            whole_number(wrong, "b")


def test_numbers():
    assert number(3, "a") == 3.0 and type(number(3, "a")) is float
    for wrong, reason in ((None, "is missing"), ("3", "not a number"), (True, "not a number"), (10**400, "too large")):
        with pytest.raises(ValueError, match=f"a .*{reason}"):
            number(wrong, "a")


@pytest.mark.parametrize(
    "value, known", [(1e-5, 1e-5), (1e-6, 1e-6), (9.999999747378752e-06, 1e-5), (9.999999974752427e-07, 1e-6)]
)
def test_epsilons_that_a_file_holds(value, known):
    assert epsilon(value, "eps") == known


@pytest.mark.parametrize("value", [1e-4, 1.1e-5, 0, -1e-5, float("nan"), float("inf")])
def test_epsilons_that_no_file_holds(value):
    with pytest.raises(ValueError, match="eps is .*, and a .m file holds 1e-05 and 1e-06 only"):
        epsilon(value, "eps")
