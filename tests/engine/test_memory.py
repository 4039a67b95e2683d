"""The memory estimate: its parts, what it proposes, and what it reads from the system."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dllama.engine import memory
from dllama.engine.kv_cache import KVCache
from dllama.engine.pages import anonymous
from dllama.errors import DllamaError, OutOfMemoryError
from dllama.formats import Arch, FloatType, ModelConfig
from dllama.kernels import tags

CONFIG = ModelConfig(
    arch=Arch.LLAMA,
    dim=2048,
    hidden_dim=5632,
    n_layers=22,
    n_heads=32,
    n_kv_heads=4,
    head_dim=64,
    vocab_size=32000,
    seq_len=2048,
    weight_type=FloatType.Q40,
)
TYPES = (FloatType.F32, FloatType.F16, FloatType.Q80)


def test_the_cache_holds_keys_and_values_of_every_layer():
    per_token = [memory.kv_bytes_per_token(CONFIG, kv_type) for kv_type in TYPES]
    assert per_token == [2 * 22 * 256 * 4, 2 * 22 * 256 * 2, 2 * 22 * 256 // 32 * 34]


@pytest.mark.parametrize("head_dim", [20, 24, 64])
@pytest.mark.parametrize("kv_type", TYPES)
def test_the_cache_is_as_large_as_estimated(kv_type, head_dim):
    config = replace(CONFIG, head_dim=head_dim)
    cache = KVCache(config, config.n_layers, config.n_kv_heads, 50, tags.BY_NAME[kv_type.name.lower()])
    assert cache.nbytes == 50 * memory.kv_bytes_per_token(config, kv_type)


def test_nodes_share_out_whole_kv_heads():
    per_token = [memory.kv_bytes_per_token(CONFIG, FloatType.F16, nodes) for nodes in (1, 2, 3, 4, 8)]
    assert per_token == [2 * 22 * heads * 64 * 2 for heads in (4, 2, 2, 1, 1)]


def test_weights_count_once_and_the_embedding_by_the_rows_in_use():
    per_row = 2048 * 4 + memory.kv_bytes_per_token(CONFIG, FloatType.F16)
    needed = memory.needed_bytes(CONFIG, 100, FloatType.F16)
    quantised = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 32000 * 2048
    norms = (2 * 22 + 1) * 2048 * 4
    assert needed == quantised // 32 * 18 + norms + 100 * per_row + memory.RUNTIME_BYTES


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("context", [1, 2, 777, 2047])
def test_the_largest_context_is_exact(kv_type, context):
    enough = memory.needed_bytes(CONFIG, context, kv_type)
    assert memory.largest_context(CONFIG, kv_type, enough) == context
    assert memory.largest_context(CONFIG, kv_type, enough - 1) == context - 1
    assert memory.largest_context(CONFIG, kv_type, 10**12) == 2048


def proposal(monkeypatch, limit: int, context: int = 2048, kv_type: FloatType = FloatType.F16) -> str:
    monkeypatch.setenv(memory.LIMIT_VARIABLE, str(limit))
    with pytest.raises(OutOfMemoryError) as caught:
        memory.require(CONFIG, context, kv_type, "model.m")
    message = str(caught.value)
    assert message.startswith("model.m: ")
    assert f"({memory.needed_bytes(CONFIG, context, kv_type)} bytes)" in message
    assert f"({limit} bytes)" in message
    assert "\n" not in message
    return message


def test_a_model_that_fits_passes(monkeypatch):
    monkeypatch.setenv(memory.LIMIT_VARIABLE, str(memory.needed_bytes(CONFIG, 2048, FloatType.F16)))
    memory.require(CONFIG, 2048, FloatType.F16, "model.m")


def test_a_shorter_context_a_smaller_cache_and_more_nodes_are_proposed_where_they_fit(monkeypatch):
    message = proposal(monkeypatch, memory.needed_bytes(CONFIG, 1500, FloatType.F16))
    assert "--max-seq-len 1500," in message
    assert "--kv-float-type q80," in message
    assert message.endswith("or 2 nodes with this much memory each")


def test_a_smaller_cache_is_proposed_together_with_a_context_where_only_both_fit(monkeypatch):
    limit = memory.needed_bytes(CONFIG, 1, FloatType.F16) - 1
    assert "--kv-float-type q80 --max-seq-len 1," in proposal(monkeypatch, limit)


def test_a_cache_that_is_small_already_is_not_proposed(monkeypatch):
    message = proposal(monkeypatch, memory.needed_bytes(CONFIG, 1500, FloatType.Q80), kv_type=FloatType.Q80)
    assert "--max-seq-len 1500," in message
    assert "q80" not in message


def test_where_nothing_fits_the_message_says_so(monkeypatch):
    assert proposal(monkeypatch, 1000).endswith("a smaller model or more memory is needed")


def test_a_limit_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "2G")
    with pytest.raises(DllamaError, match="DLLAMA_MEMORY_LIMIT=2G: not a number of bytes"):
        memory.available_bytes()


def test_a_cgroup_of_version_2_leaves_its_limit_less_what_cannot_be_dropped(tmp_path: Path):
    group = tmp_path / "fs" / "user" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/user/job\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000\n")
    (group.parent / "memory.current").write_text("700\n")
    (group.parent / "memory.stat").write_text("anon 300\ninactive_file 150\nactive_file 250\n")
    assert memory.cgroup_bytes(tmp_path / "cgroup", tmp_path / "fs") == [700]


def test_a_cgroup_of_version_1_counts_its_children_too(tmp_path: Path):
    group = tmp_path / "fs" / "memory" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu:/other\n4:memory:/job\n")
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("900\n")
    (group / "memory.stat").write_text("active_file 1\ntotal_inactive_file 50\ntotal_active_file 100\n")
    assert memory.cgroup_bytes(tmp_path / "cgroup", tmp_path / "fs") == [250]


def test_this_machine_says_what_it_has_and_what_was_used():
    assert memory.available_bytes() > 10**7
    in_use = np.ones(100_000_000, np.uint8)
    assert memory.peak_rss_bytes() > in_use.nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (3_200_000, "3.2 MB"), (4_240_000_000, "4.24 GB")],
)
def test_sizes_for_people(nbytes, text):
    assert memory.in_units(nbytes) == text


def test_memory_that_the_system_refuses():
    with pytest.raises(OutOfMemoryError, match="the system refuses 1152921504.61 GB of memory: "):
        anonymous(1 << 60, huge=True)
