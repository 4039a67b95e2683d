"""The options that make a command the edge of PrivateLoRA, and what makes no sense among them."""

import click
import pytest

from dllama.cli.edge_options import EdgeLayers, edge_values
from tests.cli.program import fails

NOTHING = {"edge_layers": None, "transfer_float_type": None, "noise": None, "reconnect_timeout": None}


@pytest.mark.parametrize("text, layers", [("0:0", (0, 0)), ("1:2", (1, 2)), ("12:0", (12, 0)), ("0:00003", (0, 3))])
def test_layers_are_a_pair_of_numbers(text, layers):
    assert EdgeLayers().convert(text, None, None) == layers
    assert EdgeLayers().convert(layers, None, None) == layers


@pytest.mark.parametrize(
    "text", ["", "1", ":", "1:", ":1", "1:2:3", "-1:0", "a:b", "1.0:1", " 1:1", "\u00b2:1", "0:123456"]
)
def test_what_is_no_pair_of_numbers(text):
    with pytest.raises(click.BadParameter, match="is not a pair of numbers such as 1:1"):
        EdgeLayers().convert(text, None, None)


def test_what_the_edge_is_told():
    defaults = {"adapter": None, "edge_layers": (0, 0), "form": "q80", "noise": 0.0, "reconnect_timeout": 120.0}
    assert edge_values("privatelora", None, **NOTHING) == defaults
    given = edge_values("privatelora", "a.plora", (1, 2), "f16", 0.5, 9.0)
    told = {"adapter": "a.plora", "edge_layers": (1, 2), "form": "f16", "noise": 0.5, "reconnect_timeout": 9.0}
    assert given == told
    assert edge_values("cluster", "a", **NOTHING) is None


@pytest.mark.parametrize(
    "name, value",
    [("edge_layers", (0, 0)), ("transfer_float_type", "f32"), ("noise", 0.0), ("reconnect_timeout", 0.0)],
)
def test_they_are_for_privatelora(name, value):
    with pytest.raises(click.UsageError, match=f"--{name.replace('_', '-')} is for --mode privatelora"):
        edge_values("cluster", None, **(NOTHING | {name: value}))


@pytest.mark.parametrize("path", ["edge.plora", "cloud.plora", "."])
def test_an_adapter_of_privatelora_without_the_mode(tmp_path, path):
    (tmp_path / "edge.plora").touch()
    with pytest.raises(click.UsageError, match="is one of PrivateLoRA: it needs --mode privatelora"):
        edge_values("cluster", str(tmp_path / path), **NOTHING)


@pytest.mark.parametrize(
    "options, said",
    [
        ((), "--mode privatelora needs one worker, the cloud: --workers HOST[:PORT]"),
        (("--workers", "a,b"), "--mode privatelora needs one worker, the cloud: --workers HOST[:PORT]"),
        (("--local-workers", "2"), "--mode privatelora needs one worker, the cloud: --workers HOST[:PORT]"),
        (("--workers", "a", "--ratios", "1:1"), "--ratios is for a cluster, and --mode privatelora has --edge-layers"),
        (("--workers", "a", "--edge-layers", "1"), "'1' is not a pair of numbers such as 1:1"),
        (("--workers", "a", "--noise", "-1"), "-1.0 is not in the range 0<=x<=100"),
    ],
)
def test_options_that_make_no_sense_together(options, said):
    assert said in fails("inference", "--prompt", "x", "--mode", "privatelora", *options, status=2)
