import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import AdapterError, DllamaError, FileError, FormatError
from dllama.formats import RopeType
from dllama.formats.rotary import interleave_pairs
from dllama.formats.safetensors import read_with_metadata, write_safetensors
from dllama.privatelora.adapter import (
    CLOUD_FILE,
    EDGE_FILE,
    CloudAdapter,
    read_cloud,
    read_edge,
    write_adapter,
    write_cloud,
    write_edge,
)
from dllama.privatelora.frozen import frozen_matrix
from dllama.privatelora.shape import AdapterShape
from dllama.targets import TARGETS
from tests.converter.checkpoints import encoded, safetensors_bytes
from tests.formats.models import LLAMA, QWEN3, config
from tests.privatelora.adapters import random_halves

MODEL = config()
SHAPE = AdapterShape.of(MODEL, 8, 4, ("q", "k", "v"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("targets, layers", [(("q", "k", "v"), None), (tuple(TARGETS), (1,))])
def test_both_halves_come_back(tmp_path, dtype, seed, targets, layers):
    shape = AdapterShape.of(MODEL, 8, 4, targets, layers)
    cloud, edge = random_halves(shape, seed, dtype)
    write_adapter(tmp_path / "new" / "folder", cloud, edge)
    found_cloud = read_cloud(tmp_path / "new" / "folder" / CLOUD_FILE)
    found_edge = read_edge(tmp_path / "new" / "folder" / EDGE_FILE)
    for found in (found_cloud, found_edge):
        assert (found.shape, found.seed, found.fingerprint) == (shape, seed, cloud.fingerprint)
        found.check(MODEL)
    found_edge.check_pair(found_cloud)
    for place in shape.places():
        np.testing.assert_array_equal(found_cloud.a(*place), cloud.a(*place))
        np.testing.assert_array_equal(found_cloud.b(*place), cloud.b(*place))
        np.testing.assert_array_equal(found_edge.m(*place), edge.m(*place))
        assert {found_cloud.a(*place).dtype, found_cloud.b(*place).dtype, found_edge.m(*place).dtype} == {
            np.dtype(np.float32)
        }


def test_only_the_seed_travels(tmp_path):
    """The shape of Llama 2 7B at rank 128: the issue's 3 MB, and A and B are as large as the seed."""
    shape = AdapterShape(32, {"dim": 4096, "q_dim": 4096, "kv_dim": 4096}, 128, 128, ("q", "k", "v"), tuple(range(32)))
    cloud, edge = random_halves(shape, 3, np.float16)
    write_adapter(tmp_path, cloud, edge)
    assert (tmp_path / CLOUD_FILE).stat().st_size < 1000
    assert 3_145_728 < (tmp_path / EDGE_FILE).stat().st_size < 3_160_000
    np.testing.assert_array_equal(
        read_cloud(tmp_path / CLOUD_FILE).b(31, "v")[:2], frozen_matrix(3, 31, "v", "B", (4096, 128))[:2]
    )


def test_rows_of_b_in_the_order_of_the_model_file():
    cloud, _ = random_halves(SHAPE)
    for target in SHAPE.targets:
        b = cloud.b(1, target)
        expected = interleave_pairs(b, MODEL.head_dim) if target != "v" else b
        np.testing.assert_array_equal(cloud.b_in_model(1, target, config(LLAMA)), expected)
        np.testing.assert_array_equal(cloud.b_in_model(1, target, config(QWEN3)), b)
        np.testing.assert_array_equal(cloud.b_in_model(1, target, config(rope_type=RopeType.HALF_SPLIT)), b)


def test_bfloat16_is_read(tmp_path):
    cloud, edge = random_halves(SHAPE, 7)
    write_edge(tmp_path / "a", edge)
    _, metadata = read_with_metadata(tmp_path / "a")
    names = {f"layers.{layer}.{target}.M": edge.m(layer, target) for layer, target in SHAPE.places()}
    data = safetensors_bytes({name: encoded(values, "BF16") for name, values in names.items()})
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": metadata}
    text = json.dumps(header).encode()
    (tmp_path / "b").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    np.testing.assert_allclose(read_edge(tmp_path / "b").m(0, "q"), edge.m(0, "q"), rtol=2**-7)


@pytest.mark.parametrize(
    "read, path, said",
    [
        (read_cloud, "edge", r"edge: this is the edge's half \(M\), where the cloud's half \(A and B\) belongs"),
        (read_edge, "cloud", r"cloud: this is the cloud's half \(A and B\), where the edge's half \(M\) belongs"),
        (read_edge, "other", "other: no PrivateLoRA adapter"),
        (read_cloud, "missing", "missing: no such file"),
        (read_cloud, "empty", "empty: not a safetensors file: 0 bytes"),
    ],
)
def test_files_of_another_kind(tmp_path, read, path, said):
    cloud, edge = random_halves(SHAPE)
    write_cloud(tmp_path / "cloud", cloud)
    write_edge(tmp_path / "edge", edge)
    write_safetensors(tmp_path / "other", {}, {})
    (tmp_path / "empty").touch()
    with pytest.raises((AdapterError, FileError), match=said):
        read(tmp_path / path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors, metadata: tensors.pop("layers.1.k.M"), "tensor layers.1.k.M is missing"),
        (lambda tensors, metadata: tensors.update(x=np.zeros(3, np.float32)), "tensor x has no place in the adapter"),
        (
            lambda tensors, metadata: tensors.update({"layers.1.k.M": np.zeros((8, 4), np.float32)}),
            r"tensor layers.1.k.M is \[8, 4\], its metadata call for \[4, 8\]",
        ),
        (lambda tensors, metadata: tensors["layers.1.k.M"].fill(np.nan), "tensor layers.1.k.M has values that are not"),
        (lambda tensors, metadata: tensors["layers.0.v.M"].fill(np.inf), "tensor layers.0.v.M has values that are not"),
        (lambda tensors, metadata: metadata.pop("r_c2d"), "not a sound adapter: r_c2d is missing"),
        (lambda tensors, metadata: metadata.update(version="2"), "version 2, and this program reads 1"),
        (lambda tensors, metadata: metadata.update(seed="x"), "seed is 'x', not a whole number"),
        (lambda tensors, metadata: metadata.update(seed=str(1 << 64)), "more than 64 bits"),
        (lambda tensors, metadata: metadata.update(seed="8"), "damaged: its fingerprint is not that of its seed"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, change, said):
    _, edge = random_halves(SHAPE, 7)
    write_edge(tmp_path / "a", edge)
    tensors, metadata = read_with_metadata(tmp_path / "a")
    arrays = {name: tensor.values().copy() for name, tensor in tensors.items()}
    change(arrays, metadata)
    write_safetensors(tmp_path / "b", arrays, metadata)
    with pytest.raises((AdapterError, FormatError), match=f"b: .*{said}"):
        read_edge(tmp_path / "b")


def test_values_that_changed_are_noticed(tmp_path):
    cloud, _ = random_halves(SHAPE)
    write_cloud(tmp_path / "a", cloud)
    data = bytearray((tmp_path / "a").read_bytes())
    data[-3] ^= 1
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(AdapterError, match="a: damaged: its fingerprint is not that of its A and B"):
        read_cloud(tmp_path / "a")


def test_halves_that_do_not_belong_together():
    _, edge = random_halves(SHAPE, 7)
    edge.check_pair(CloudAdapter(SHAPE, 7))
    with pytest.raises(AdapterError, match="trained with other A and B than those of the adapter"):
        edge.check_pair(CloudAdapter(SHAPE, 8))
    with pytest.raises(AdapterError, match="r_c2d is 8 here and 16 there"):
        edge.check_pair(CloudAdapter(AdapterShape.of(MODEL, 16, 4, ("q", "k", "v")), 7))
    with pytest.raises(AdapterError, match="the adapter: for a model of 2 layers, and this one has 5"):
        edge.check(config(n_layers=5))


def test_claims_of_the_metadata_allocate_nothing(tmp_path):
    _, edge = random_halves(SHAPE)
    write_edge(tmp_path / "a", edge)
    tensors, metadata = read_with_metadata(tmp_path / "a")
    arrays = {name: tensor.values() for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "b", arrays, metadata | {"r_c2d": "8192", "r_d2c": "8192"})
    tracemalloc.start()
    with pytest.raises(AdapterError, match="its metadata call for"):
        read_edge(tmp_path / "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.plora"


VALUES = st.one_of(st.text(max_size=8), st.sampled_from(["1", "2", "8", "q", "0 1", "privatelora edge"]))


@given(st.dictionaries(st.sampled_from(sorted(SHAPE.to_metadata())), VALUES, max_size=3), st.booleans())
def test_any_metadata_give_an_adapter_or_an_error_of_ours(fuzzed, changes, is_cloud):
    cloud, edge = random_halves(SHAPE)
    (write_cloud if is_cloud else write_edge)(fuzzed, cloud if is_cloud else edge)
    tensors, metadata = read_with_metadata(fuzzed)
    write_safetensors(fuzzed, {name: tensor.values() for name, tensor in tensors.items()}, metadata | changes)
    try:
        (read_cloud if is_cloud else read_edge)(fuzzed)
    except DllamaError as error:
        assert "\n" not in str(error)
