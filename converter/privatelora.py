"""A PrivateLoRA adapter as it was published -> `cloud.plora` and `edge.plora`.

The adapter is a torch checkpoint (or the same in safetensors) of ``nn.Linear`` weights under
``model.layers.{i}.self_attn.{q,k,v}_lora.{lora_A,lora_mobile,lora_B}.weight``. The published splitter makes two of it:
``model.layers.{i}.self_attn.lora_AB.lora_A`` and ``.lora_B`` with q, k and v stacked beside the cloud's base weights,
and ``lora_M_stack.layers.{i}.lora_M`` beside the device's. All forms are read; base weights are left aside.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from converter.huggingface import BUFFERS, IN_LAYER, WHOLE_MODEL
from converter.torch_file import LOCAL_SIGNATURE, read_torch_file
from dllama.errors import AdapterError, FileError
from dllama.formats.files import open_regular, refuse_overwriting
from dllama.formats.safetensors import read_safetensors
from dllama.formats.tensor import READABLE, Tensor
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, CloudAdapter, EdgeAdapter, write_adapter
from dllama.privatelora.frozen import MATRICES, MAX_SEED
from dllama.privatelora.shape import AdapterShape

STACKED = ("q", "k", "v")
LAYER = "(0|[1-9][0-9]{0,4})"
ONE = re.compile(rf"model\.layers\.{LAYER}\.self_attn\.([qkv])_lora\.(lora_A|lora_mobile|lora_B)\.weight")
CLOUD_STACK = re.compile(rf"model\.layers\.{LAYER}\.self_attn\.lora_AB\.(lora_A|lora_B)")
EDGE_STACK = re.compile(rf"lora_M_stack\.layers\.{LAYER}\.(lora_M)")
PUBLISHED = {"lora_A": "A", "lora_B": "B", "lora_mobile": "M", "lora_M": "M"}
BASE = (*WHOLE_MODEL.values(), *IN_LAYER.values(), *BUFFERS, "embed_tokens.weight")

FLOAT_TYPES = {"f16": np.float16, "f32": np.float32}
CLOSE = {"F32": 2.0**-22, "F16": 2.0**-10, "BF16": 2.0**-7}
"""How far, relatively, a value may be from what its seed gives: a rounding of each dtype."""

Key = tuple[int, str, str]  # layer, target, and "A", "B" or "M"


def read_published(
    paths: Sequence[Path], seed: int | None, n_layers: int | None, dtype: type
) -> tuple[CloudAdapter, EdgeAdapter]:
    """The adapter in one published file, or in several.

    seed: what A and B came from, None to keep them themselves;  n_layers: of the model, None where its last layer has
    an adapter;  dtype: of A, B and M
    Raises FileError (FormatError) for files that cannot be read, AdapterError for what they hold.
    """
    found = _collect(paths)
    try:
        shape = _shape(found, n_layers)
    except ValueError as error:
        raise AdapterError(f"{paths[0]}: {error}") from None
    for (_, target, matrix), tensor in found.items():
        expected = {"A": shape.a(target), "B": shape.b(target), "M": shape.m}[matrix]
        if tensor.shape != expected:
            raise AdapterError(
                f"{tensor.path}: tensor {tensor.name} is {list(tensor.shape)}, and the others call for {list(expected)}"
            )
    if seed is None:
        frozen = {key: _rounded(tensor, dtype) for key, tensor in found.items() if key[2] in MATRICES}
        cloud = CloudAdapter(shape, matrices=frozen)
    else:
        cloud = CloudAdapter(shape, seed)
        _check_seed(cloud, found)
    trained = {(layer, target): _rounded(found[layer, target, "M"], dtype) for layer, target in shape.places()}
    return cloud, EdgeAdapter(shape, trained, cloud.fingerprint, seed)


def _collect(paths: Sequence[Path]) -> dict[Key, Tensor]:
    """The adapter's matrices in all files, those of each place complete."""
    found: dict[Key, Tensor] = {}
    for path in paths:
        with open_regular(path) as file:
            is_torch = file.read(4) == LOCAL_SIGNATURE or path.suffix in (".bin", ".pt", ".pth")
        for key, tensor in _matrices(read_torch_file(path) if is_torch else read_safetensors(path)):
            if key in found:
                raise AdapterError(f"{path}: tensor {tensor.name} is in {found[key].path} as well")
            found[key] = tensor
    if not found:
        raise AdapterError(f"{paths[0]}: holds no matrices of a PrivateLoRA adapter")
    for matrix, half in {"A": "cloud's", "B": "cloud's", "M": "device's"}.items():
        if not any(key[2] == matrix for key in found):
            raise AdapterError(f"{paths[0]}: holds no {matrix}: name the {half} file as well")
    for layer, target in sorted({key[:2] for key in found}):
        for matrix in "ABM":
            if (layer, target, matrix) not in found:
                raise AdapterError(f"{paths[0]}: {matrix} of {target} in layer {layer} is missing")
    return found


def _matrices(tensors: dict[str, Tensor]) -> Iterator[tuple[Key, Tensor]]:
    """The adapter's matrices in one file; AdapterError for a tensor that is neither its own nor a base model's."""
    for name, tensor in tensors.items():
        if match := ONE.fullmatch(name):
            yield (int(match[1]), match[2], PUBLISHED[match[3]]), tensor
        elif match := CLOUD_STACK.fullmatch(name) or EDGE_STACK.fullmatch(name):
            for target, part in zip(STACKED, _unstacked(tensor), strict=True):
                yield (int(match[1]), target, PUBLISHED[match[2]]), part
        elif not name.endswith(BASE):
            raise AdapterError(f"{tensor.path}: tensor {name} is none of a PrivateLoRA adapter")


def _unstacked(tensor: Tensor) -> list[Tensor]:
    """The matrices of q, k and v in a tensor that stacks them."""
    if tensor.dtype not in READABLE:
        raise AdapterError(f"{tensor.path}: tensor {tensor.name} is {tensor.dtype} (known: {', '.join(READABLE)})")
    if len(tensor.shape) != 3 or tensor.shape[0] != len(STACKED):
        raise AdapterError(f"{tensor.path}: tensor {tensor.name} is {list(tensor.shape)}, no stack of q, k and v")
    nbytes = tensor.nbytes // len(STACKED)
    return [replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + i * nbytes) for i in range(len(STACKED))]


def _shape(found: dict[Key, Tensor], n_layers: int | None) -> AdapterShape:
    """The shape that the first place's matrices tell; ValueError where they tell none."""
    layers = sorted({layer for layer, _, _ in found})
    targets = tuple(target for target in STACKED if (layers[0], target, "A") in found)
    missing = next(((i, t) for i in layers for t in STACKED if ((i, t, "A") in found) != (t in targets)), None)
    if missing:
        raise ValueError(
            f"{missing[1]} has an adapter in some layers and none in others, such as in layer {missing[0]}"
        )
    matrices = {(target, matrix): found[layers[0], target, matrix] for target in targets for matrix in MATRICES}
    for tensor in matrices.values():
        if len(tensor.shape) != 2:
            raise ValueError(f"tensor {tensor.name} is {list(tensor.shape)}, no matrix")
    r_c2d, dim = matrices[targets[0], "A"].shape
    widths = {"dim": dim}
    for target in targets:
        widths.setdefault("q_dim" if target == "q" else "kv_dim", matrices[target, "B"].shape[0])
    r_d2c = matrices[targets[0], "B"].shape[1]
    return AdapterShape(n_layers or layers[-1] + 1, widths, r_c2d, r_d2c, targets, tuple(layers))


def _rounded(tensor: Tensor, dtype: type) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = tensor.values().astype(dtype)
    if not np.isfinite(values).all():
        raise AdapterError(f"{tensor.path}: tensor {tensor.name} has values beyond f16 (--float-type f32 holds them)")
    return values


def _check_seed(cloud: CloudAdapter, found: dict[Key, Tensor]) -> None:
    for layer, target in cloud.shape.places():
        for matrix, expected in (("A", cloud.a(layer, target)), ("B", cloud.b(layer, target))):
            tensor = found[layer, target, matrix]
            if not np.allclose(tensor.values(), expected, rtol=CLOSE[tensor.dtype], atol=2.0**-24):
                raise AdapterError(
                    f"{tensor.path}: tensor {tensor.name} is not what seed {cloud.seed} gives "
                    "(without --seed, A and B are stored themselves)"
                )


@click.command("privatelora")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), help="Store this seed for A and B, if they are what it gives."
)
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model, if the last ones have no adapter.")
@click.option(
    "--float-type",
    type=click.Choice(list(FLOAT_TYPES), case_sensitive=False),
    default="f16",
    show_default=True,
    help="How to store A, B and M.",
)
@click.option("--force", is_flag=True, help="Replace the files where they exist.")
def command(files: tuple[Path, ...], output: Path, seed: int | None, layers: int | None, float_type: str, force: bool):
    """Convert a published PrivateLoRA adapter: cloud.plora with A and B, edge.plora with M, in a folder.

    FILES is pl_gsm8k.bin or the like, or what the published splitter made of it: the cloud's file and the device's.

    \b
    Examples:
      dllama-convert privatelora pl_gsm8k.bin -o gsm8k
      dllama-convert privatelora cloud/pytorch_model.bin device/pytorch_model.bin -o gsm8k
    """
    for name in (CLOUD_FILE, EDGE_FILE):
        if os.path.exists(output / name) and not force:
            raise FileError(output / name, "exists already (--force replaces it)")
        refuse_overwriting(output / name, files)
    cloud, edge = read_published(files, seed, layers, FLOAT_TYPES[float_type])
    write_adapter(output, cloud, edge)
    shape = cloud.shape
    sizes = ", ".join(f"{name} {(output / name).stat().st_size:,} bytes" for name in (CLOUD_FILE, EDGE_FILE))
    click.echo(
        f"{output}: {sizes}; {', '.join(shape.targets)} of {len(shape.layers)} layers, "
        f"rank {shape.r_c2d} to the device and {shape.r_d2c} back"
    )
