"""Which kernels are chosen, and what is said of those that cannot be."""

import os
import subprocess
import sys

import pytest

from dllama.errors import KernelError
from dllama.kernels import cpu


@pytest.fixture
def features(monkeypatch):
    """Sets the features of the CPU, and keeps numba's own settings from being changed."""
    monkeypatch.setattr(cpu.config, "CPU_FEATURES", "")
    monkeypatch.delenv("DLLAMA_KERNELS", raising=False)

    def give(machine: str, *names: str):
        monkeypatch.setattr(cpu, "machine", lambda: machine)
        monkeypatch.setattr(cpu, "features", lambda: frozenset(names))

    return give


AVX2 = cpu.REQUIREMENTS["avx2"]
AVX512 = cpu.REQUIREMENTS["avx512"]


@pytest.mark.parametrize(
    "machine, names, expected",
    [
        ("x86_64", (*AVX2, *AVX512), "avx512"),
        ("x86_64", (*AVX2, *(name for name in AVX512 if name != "avx512vnni")), "avx2"),
        ("x86_64", AVX2, "avx2"),
        ("x86_64", ("avx", "sse4.2"), "plain"),
        ("aarch64", ("neon", "dotprod", "fullfp16"), "neon-dotprod"),
        ("aarch64", ("neon",), "neon"),
        ("riscv64", (), "plain"),
    ],
)
def test_the_best_that_the_cpu_can_run_is_chosen(features, machine, names, expected):
    features(machine, *names)
    assert cpu.select() == expected


@pytest.mark.parametrize("asked", ["avx2", " AVX2\n"])
def test_others_may_be_forced(features, monkeypatch, asked):
    features("x86_64", *AVX2, *AVX512)
    monkeypatch.setenv("DLLAMA_KERNELS", asked)
    assert cpu.select() == "avx2"


@pytest.mark.parametrize(
    "asked, machine, names, message",
    [
        ("sse9", "x86_64", AVX2, "DLLAMA_KERNELS=sse9: no such kernels; choose one of avx512, avx2, neon-dotprod,"),
        ("neon", "x86_64", AVX2, "DLLAMA_KERNELS=neon: these kernels are for aarch64, this is x86_64"),
        ("avx2", "aarch64", ("neon",), "DLLAMA_KERNELS=avx2: these kernels are for x86_64, this is aarch64"),
        ("avx512", "x86_64", AVX2, "DLLAMA_KERNELS=avx512: this CPU lacks avx512f, avx512bw, avx512vl, avx512dq"),
        ("neon-dotprod", "aarch64", ("neon",), "DLLAMA_KERNELS=neon-dotprod: this CPU lacks dotprod"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(features, monkeypatch, asked, machine, names, message):
    features(machine, *names)
    monkeypatch.setenv("DLLAMA_KERNELS", asked)
    with pytest.raises(KernelError) as caught:
        cpu.select()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_features_are_the_ones_that_the_compiler_uses(monkeypatch):
    monkeypatch.setattr(cpu.config, "CPU_FEATURES", "+neon,-dotprod,+crc")
    assert cpu.features() == {"neon", "crc"}
    monkeypatch.setattr(cpu.config, "CPU_FEATURES", None)
    monkeypatch.setattr(cpu.config, "CPU_NAME", "generic")
    assert cpu.features() == frozenset()


def test_forced_kernels_keep_the_compiler_from_using_more():
    """In a process of its own, since numba's settings hold for all of it."""
    code = "from dllama.kernels import cpu, jit; print(jit.ISA.name, cpu.config.CPU_NAME, sorted(cpu.features()))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")}
    out = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "DLLAMA_KERNELS": "plain"}, capture_output=True, text=True
    )
    assert out.stdout == "plain generic []\n", out.stderr
