"""Published PrivateLoRA adapters, written with the facts about their key names alone."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from converter.cli import main
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, read_cloud, read_edge
from dllama.privatelora.frozen import frozen_matrix
from tests.converter.checkpoints import encoded, safetensors_bytes
from tests.converter.torch_files import torch_bytes

DIM, KV_DIM, UP, BACK, LAYERS = 24, 8, 4, 6, 3
OUTPUTS = {"q": DIM, "k": KV_DIM, "v": KV_DIM}
STACKABLE = dict.fromkeys("qkv", DIM)


def published(seed=None, outputs=OUTPUTS, layers=range(LAYERS)) -> dict[str, np.ndarray]:
    """An adapter in one file, F32; A and B from a seed where there is one."""
    rng = np.random.default_rng(5)
    tensors = {}
    for layer in layers:
        for target, rows in outputs.items():
            prefix = f"model.layers.{layer}.self_attn.{target}_lora."
            for name, matrix, shape in (("lora_A", "A", (UP, DIM)), ("lora_B", "B", (rows, BACK))):
                values = rng.standard_normal(shape, np.float32)
                tensors[f"{prefix}{name}.weight"] = (
                    values if seed is None else frozen_matrix(seed, layer, target, matrix, shape)
                )
            tensors[f"{prefix}lora_mobile.weight"] = rng.standard_normal((BACK, UP), np.float32)
    return tensors


def split(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The published splitter's files, for the cloud and for the device, with some of the base weights."""
    cloud = {"model.norm.weight": np.ones(DIM, np.float32)}
    device = {name: np.ones((5, DIM), np.float32) for name in ("embed_tokens.weight", "lm_head.weight")}
    for layer in range(LAYERS):
        one, stack = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.self_attn.lora_AB."
        cloud[one + "q_proj.weight"] = np.ones((DIM, DIM), np.float32)
        for name in ("lora_A", "lora_B"):
            cloud[stack + name] = np.stack([tensors[f"{one}{target}_lora.{name}.weight"] for target in "qkv"])
        device[f"lora_M_stack.layers.{layer}.lora_M"] = np.stack(
            [tensors[f"{one}{target}_lora.lora_mobile.weight"] for target in "qkv"]
        )
    return cloud, device


def write(path, tensors, dtype="F32"):
    pack = safetensors_bytes if path.suffix == ".safetensors" else torch_bytes
    path.write_bytes(pack({name: encoded(values, dtype) for name, values in tensors.items()}))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["privatelora", *map(str, arguments)])


def assert_holds(folder, tensors, dtype=np.float32):
    cloud, edge = read_cloud(folder / CLOUD_FILE), read_edge(folder / EDGE_FILE)
    edge.check_pair(cloud)
    assert cloud.shape.layers == tuple(range(LAYERS)) and cloud.shape.n_layers == LAYERS
    assert (cloud.shape.r_c2d, cloud.shape.r_d2c, cloud.shape.targets) == (UP, BACK, ("q", "k", "v"))
    for layer, target in cloud.shape.places():
        prefix = f"model.layers.{layer}.self_attn.{target}_lora."
        for found, name in (
            (cloud.a(layer, target), "lora_A"),
            (cloud.b(layer, target), "lora_B"),
            (edge.m(layer, target), "lora_mobile"),
        ):
            np.testing.assert_array_equal(found, tensors[f"{prefix}{name}.weight"].astype(dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["pl_gsm8k.bin", "adapter.safetensors"])
@pytest.mark.parametrize("float_type, dtype", [("f32", np.float32), ("f16", np.float16)])
def test_one_file(tmp_path, name, float_type, dtype):
    tensors = published()
    result = run(write(tmp_path / name, tensors), "-o", tmp_path / "out", "--float-type", float_type)
    assert result.exit_code == 0, result.output
    assert "q, k, v of 3 layers, rank 4 to the device and 6 back" in result.stdout
    assert_holds(tmp_path / "out", tensors, dtype)


def test_what_the_splitter_made_of_it(tmp_path):
    tensors = published(outputs=STACKABLE)
    cloud, device = split(tensors)
    files = write(tmp_path / "cloud.bin", cloud), write(tmp_path / "device.safetensors", device)
    result = run(*files, "-o", tmp_path / "out", "--float-type", "f32")
    assert result.exit_code == 0, result.output
    assert_holds(tmp_path / "out", tensors)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_seed_in_place_of_a_and_b(tmp_path, dtype):
    path = write(tmp_path / "a.bin", published(seed=9), dtype)
    assert run(path, "-o", tmp_path / "out", "--seed", 9).exit_code == 0
    assert read_cloud(tmp_path / "out" / CLOUD_FILE).seed == 9
    assert (tmp_path / "out" / CLOUD_FILE).stat().st_size < 1000
    result = run(path, "-o", tmp_path / "other", "--seed", 10)
    assert result.exit_code == 1 and "lora_A.weight is not what seed 10 gives" in result.stderr
    assert not (tmp_path / "other").exists()


def test_a_model_whose_last_layers_have_no_adapter(tmp_path):
    path = write(tmp_path / "a.bin", published(layers=[1]))
    assert run(path, "-o", tmp_path / "out", "--layers", 8).exit_code == 0
    shape = read_cloud(tmp_path / "out" / CLOUD_FILE).shape
    assert (shape.n_layers, shape.layers) == (8, (1,))
    result = run(path, "-o", tmp_path / "out", "--layers", 1, "--force")
    assert result.exit_code == 1 and "its layers are not those of a model of 1" in result.stderr


Q = "model.layers.1.self_attn.q_lora."
MISTAKES = [
    (lambda t: t.clear() or t.update({"lm_head.weight": np.ones((2, 2))}), "holds no matrices of a PrivateLoRA"),
    (lambda t: t.pop(Q + "lora_B.weight"), "B of q in layer 1 is missing"),
    (lambda t: [t.pop(name) for name in list(t) if "mobile" in name], "holds no M: name the device's file as well"),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)], "q has an adapter in some layers and none in"),
    (lambda t: t.update({"model.layers.0.self_attn.o_lora.lora_A.weight": np.ones((2, 2))}), "o_lora.lora_A.weight is"),
    (lambda t: t.update({Q + "lora_A.weight": np.ones((UP + 1, DIM))}), r"is \[5, 24\], and the others call for \[4"),
    (lambda t: t.update({Q + "lora_mobile.weight": np.ones((UP, BACK))}), r"is \[4, 6\], and the others call for \[6"),
    (lambda t: t[Q + "lora_mobile.weight"].fill(np.nan), "q_lora.lora_mobile.weight has values that are not finite"),
    (lambda t: t[Q + "lora_mobile.weight"].fill(1e6), r"has values beyond f16 \(--float-type f32 holds them\)"),
    (lambda t: t.update({"lora_M_stack.layers.0.lora_M": np.ones((2, 6, 4))}), "no stack of q, k and v"),
    (lambda t: t.update({"lora_M_stack.layers.0.lora_M": np.ones((3, 6, 4))}), "lora_M is in .*a.bin as well"),
]


@pytest.mark.parametrize("change, said", MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, change, said):
    tensors = published()
    change(tensors)
    path = write(tmp_path / "a.bin", {name: np.float32(values) for name, values in tensors.items()})
    result = run(path, "-o", tmp_path / "out")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert re.search(said, result.stderr)
    assert not (tmp_path / "out").exists()


def test_no_half_of_an_adapter(tmp_path):
    (tmp_path / "out" / "edge.plora").mkdir(parents=True)
    result = run(write(tmp_path / "a.bin", published()), "-o", tmp_path / "out", "--force")
    assert result.exit_code == 1 and "edge.plora: exists and is not a regular file" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["edge.plora"]


def test_an_adapter_in_place_of_its_source_is_refused(tmp_path):
    path = write(tmp_path / "cloud.plora", published())
    before = path.read_bytes()
    result = run(path, "-o", tmp_path, "--force")
    assert result.exit_code == 1 and "cloud.plora: is what it would be made from" in result.stderr
    assert path.read_bytes() == before


def test_a_stack_of_an_unknown_type_is_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(
        safetensors_bytes({"lora_M_stack.layers.0.lora_M": ("F4", (3, 6, 4), bytes(36))})
    )
    result = run(tmp_path / "a.safetensors", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "lora_M is F4 (known: F32, F16, BF16)" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_existing_files_stay_unless_forced(tmp_path):
    path = write(tmp_path / "a.bin", published())
    assert run(path, "-o", tmp_path / "out").exit_code == 0
    result = run(path, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "cloud.plora: exists already (--force replaces it)" in result.stderr
    assert run(path, "-o", tmp_path / "out", "--force").exit_code == 0


@pytest.mark.parametrize("name, content", [("a.bin", b"\x80\x02}."), ("a.safetensors", b"abc"), ("none.bin", None)])
def test_files_that_cannot_be_read(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run(tmp_path / name, "-o", tmp_path / "out")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and name in result.stderr
