"""The header of a `.m` file: bytes <-> ModelConfig.

``int32 0x0A00ABCD, int32 header_size``, then ``(int32 key, int32 value)`` pairs up to ``header_size``.
"""

import struct

from dllama.formats.blocks import FloatType
from dllama.formats.config import Activation, Arch, ModelConfig, RopeType

MAGIC = 0x0A00ABCD
OLD_MAGIC = 0x00ABCD00

KEYS = (
    "version",
    "architecture",
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "n_experts",
    "n_active_experts",
    "vocab_size",
    "seq_len",
    "activation",
    "rope_theta",
    "weight_type",
    "rope_scaling_factor",
    "rope_scaling_low_freq_factor",
    "rope_scaling_high_freq_factor",
    "rope_scaling_orig_seq_len",
    "rope_type",
    "head_dim",
    "norm_epsilon",
    "moe_hidden_dim",
)
"""Name of each key, at the key's number."""

REQUIRED = (
    *("architecture", "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads"),
    *("vocab_size", "seq_len", "weight_type"),
)
SCALING = (
    *("rope_scaling_factor", "rope_scaling_low_freq_factor"),
    *("rope_scaling_high_freq_factor", "rope_scaling_orig_seq_len"),
)
EPSILONS = {5: 1e-5, 6: 1e-6}

MAX_HEADER_BYTES = 8 + 8 * len(KEYS)


def unpack_header(data: bytes) -> tuple[ModelConfig, int]:
    """Read a header from the first bytes of a file.

    data: the first MAX_HEADER_BYTES of the file, or all of a shorter one
    Returns the config and the offset of the weights. Raises ValueError with the reason for anything wrong.
    """
    if len(data) < 4:
        raise ValueError(f"not a model: {len(data)} bytes")
    magic = struct.unpack_from("<i", data)[0]
    if magic == OLD_MAGIC:
        raise ValueError("a model with the old header 0x00ABCD00, which is no longer read: convert the model again")
    if magic != MAGIC:
        raise ValueError(f"not a model: it starts with {magic & 0xFFFFFFFF:#010x}, a .m file with {MAGIC:#010x}")
    if len(data) < 8:
        raise ValueError("truncated inside its header")
    size = struct.unpack_from("<i", data, 4)[0]
    if size < 16 or size > MAX_HEADER_BYTES or size % 8:
        raise ValueError(f"header size {size} is not 8 + 8 * pairs with 1 to {len(KEYS)} pairs")
    if len(data) < size:
        raise ValueError(f"truncated inside its header: {size} bytes expected, {len(data)} found")
    return _config(_pairs(data[8:size])), size


def pack_header(config: ModelConfig) -> bytes:
    """The header that describes ``config``. ValueError where a value is not one the header can hold."""
    exponents = {epsilon: exponent for exponent, epsilon in EPSILONS.items()}
    if config.norm_epsilon not in exponents:
        raise ValueError(f"norm epsilon {config.norm_epsilon} cannot be stored: the format holds 1e-05 and 1e-06 only")
    values = {
        "version": 0,
        "architecture": config.arch,
        "rope_theta": config.rope_theta,
        "norm_epsilon": exponents[config.norm_epsilon],
    }
    for name in KEYS:
        if name not in values and hasattr(config, name):
            values[name] = getattr(config, name)
    if config.rope_type is not RopeType.LLAMA3_1:
        for name in SCALING:
            del values[name]
    if not config.arch.has_experts:
        del values["moe_hidden_dim"]
    for name, value in values.items():
        if value != int(value):
            raise ValueError(f"{name} {value} cannot be stored: the format holds whole numbers only")
    pairs = [(KEYS.index(name), int(value)) for name, value in sorted(values.items(), key=lambda v: KEYS.index(v[0]))]
    return struct.pack("<ii", MAGIC, 8 + 8 * len(pairs)) + b"".join(struct.pack("<ii", *pair) for pair in pairs)


def _pairs(data: bytes) -> dict[str, int]:
    values: dict[str, int] = {}
    for key, value in struct.iter_unpack("<ii", data):
        if not 0 <= key < len(KEYS):
            raise ValueError(f"unknown header key {key} (known: 0 to {len(KEYS) - 1})")
        name = KEYS[key]
        if name in values:
            raise ValueError(f"header key {key} ({name}) appears twice")
        values[name] = value
    return values


def _config(values: dict[str, int]) -> ModelConfig:
    if values.get("version", 0) != 0:
        raise ValueError(f"header version {values['version']} is not known (known: 0)")
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise ValueError(f"the header lacks {', '.join(missing)}")

    arch = _member(Arch, values, "architecture")
    if "head_dim" not in values:
        if values["n_heads"] < 1 or values["dim"] % values["n_heads"]:
            raise ValueError(f"dim {values['dim']} cannot be split over {values['n_heads']} heads")
        values["head_dim"] = values["dim"] // values["n_heads"]
    epsilon = values.get("norm_epsilon", 5)
    if epsilon not in EPSILONS:
        raise ValueError(f"norm_epsilon is {epsilon}, not 5 or 6 (for 1e-5 or 1e-6)")
    rope_type = _rope_type(values, arch)
    scaling = {name: values[name] for name in SCALING} if rope_type is RopeType.LLAMA3_1 else {}
    return ModelConfig(
        arch=arch,
        **{name: values[name] for name in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim")},
        vocab_size=values["vocab_size"],
        seq_len=values["seq_len"],
        norm_epsilon=EPSILONS[epsilon],
        rope_theta=float(values.get("rope_theta", 10000)),
        rope_type=rope_type,
        **{name: value if name.endswith("seq_len") else float(value) for name, value in scaling.items()},
        weight_type=_member(FloatType, values, "weight_type"),
        activation=_member(Activation, values, "activation", Activation.SILU),
        **{name: values.get(name, 0) for name in ("n_experts", "n_active_experts", "moe_hidden_dim")},
    )


def _rope_type(values: dict[str, int], arch: Arch) -> RopeType:
    """The rope type, with what existing files leave out filled in.

    Files of qwen3 may leave the type out or say 0; they are half-split all the same. A scaling factor other than 0
    and 1 says LLAMA3_1 where the type is left out.
    """
    rope_type = _member(RopeType, values, "rope_type", RopeType.LLAMA)
    scaled = values.get("rope_scaling_factor", 0) not in (0, 1)
    if arch.is_qwen3 and rope_type is RopeType.LLAMA and not scaled:
        return RopeType.HALF_SPLIT
    if scaled and "rope_type" not in values:
        rope_type = RopeType.LLAMA3_1
    if scaled and rope_type is not RopeType.LLAMA3_1:
        raise ValueError(f"rope type {rope_type.name} with a scaling factor of {values['rope_scaling_factor']}")
    missing = [name for name in SCALING if name not in values]
    if rope_type is RopeType.LLAMA3_1 and missing:
        raise ValueError(f"rope type {rope_type.name} but the header lacks {', '.join(missing)}")
    return rope_type


def _member(kind, values: dict[str, int], name: str, default=None):
    if name not in values and default is not None:
        return default
    try:
        return kind(values[name])
    except ValueError:
        known = ", ".join(f"{member:#x} {member.name.lower()}" for member in kind)
        raise ValueError(f"unknown {name.replace('_', ' ')} {values[name]:#x} (known: {known})") from None
