"""What a run prints and records: the line for each token, the averages, the statistics file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dllama.cli.shape import describe, shape
from dllama.engine.memory import peak_rss_bytes
from dllama.formats.files import AtomicFile

if TYPE_CHECKING:
    from dllama import Llama

PROMPT_WIDTH = 60


@dataclass
class Run:
    """One generation as it happened. Times are in milliseconds, lists have an element for each generated token."""

    prompt_tokens: int
    prefill_ms: float = 0.0
    pieces: list = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def start_lines(llama: Llama) -> str:
    """What was loaded and how it runs."""
    return (
        f"💡 {describe(llama.config)}\n"
        f"💡 context {llama.context}, {llama.nthreads} threads, {llama.kernels} kernels\n"
        f"⏩ loaded in {llama.load_ms:.0f} ms"
    )


def prompt_line(run: Run, prompt: str) -> str:
    """The line of the prompt phase: its time, its tokens and how it begins."""
    shown = visible(prompt[:PROMPT_WIDTH]) + ("…" if len(prompt) > PROMPT_WIDTH else "")
    return f"🔷 P {run.prefill_ms:.0f} ms {run.prompt_tokens} tokens {shown}"


def token_line(piece) -> str:
    """The line of one token: generation, inference and transfer time, bytes sent and received, and its text."""
    return (
        f"🔶 G {piece.generation_ms:.0f} ms I {piece.inference_ms:.0f} ms T {piece.transfer_ms:.0f} ms "
        f"S {piece.sent_bytes / 1000:.0f} kB R {piece.received_bytes / 1000:.0f} kB {visible(piece.text)}"
    )


def visible(text: str) -> str:
    """The text on one line: line breaks and other control characters, which could move the cursor, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def averages(run: Run) -> str:
    """Two lines, prompt and generation: tokens, time for each, tokens in a second."""
    generation_ms = sum(piece.generation_ms for piece in run.pieces)
    return "\n".join(
        f"{name:<10} {count:>5} tokens {total / count:>9.2f} ms/token {1000 * count / total:>9.2f} tokens/s"
        for name, count, total in (
            ("Prompt", run.prompt_tokens, run.prefill_ms),
            ("Generation", len(run.pieces), generation_ms),
        )
        if count and total
    )


def statistics(run: Run, llama: Llama) -> dict:
    """The run as plain data, for programs: what `--stats` writes."""
    pieces = run.pieces
    return {
        "prompt_tokens": run.prompt_tokens,
        "generated_tokens": len(pieces),
        "text": run.text,
        "token_ids": [piece.token_id for piece in pieces],
        "prefill_ms": run.prefill_ms,
        "decode_ms": [piece.generation_ms for piece in pieces],
        "inference_ms": [piece.inference_ms for piece in pieces],
        "transfer_ms": [piece.transfer_ms for piece in pieces],
        "sent_bytes": [piece.sent_bytes for piece in pieces],
        "received_bytes": [piece.received_bytes for piece in pieces],
        "load_ms": llama.load_ms,
        "peak_rss_bytes": peak_rss_bytes(),
        "kernels": llama.kernels,
        "nthreads": llama.nthreads,
        "model": shape(llama.config),
    }


def write_statistics(path: str | os.PathLike, values: dict) -> None:
    """Write JSON, the whole file or none. Raises FileError."""
    data = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    with AtomicFile(path, len(data)) as file:
        file.write(data)
