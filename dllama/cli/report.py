"""What a run prints and records: the line for each token, the averages, the statistics file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dllama.cli.shape import describe, shape
from dllama.engine.memory import peak_rss_bytes
from dllama.formats.files import AtomicFile

if TYPE_CHECKING:
    from dllama import Llama, Piece, SamplerSettings

PROMPT_WIDTH = 60
FIGURES = ("inference_ms", "transfer_ms", "sent_bytes", "received_bytes")
"""Of a `NodeCost`."""


@dataclass
class Run:
    """One generation as it happened: the prompt as text and as token ids, then the pieces that were generated."""

    prompt: str
    prompt_ids: list[int]
    prefill_ms: float = 0.0
    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The generated text."""
        return "".join(piece.text for piece in self.pieces)


def start_lines(llama: Llama, settings: SamplerSettings) -> str:
    """What was loaded and how it runs."""
    from dllama.kernels.team import in_threads

    seed = f", seed {settings.seed}" if settings.temperature else ""
    return (
        f"💡 {describe(llama.config)}\n"
        f"💡 context {llama.context}, {in_threads(llama.nthreads)}, {llama.kernels} kernels{seed}\n"
        f"⏩ loaded in {llama.load_ms:.0f} ms"
    )


def prompt_line(run: Run) -> str:
    """The line of the prompt phase: its time, its tokens and how the prompt begins."""
    shown = visible(run.prompt[:PROMPT_WIDTH]) + ("…" if len(run.prompt) > PROMPT_WIDTH else "")
    return f"🔷 P {run.prefill_ms:.0f} ms {len(run.prompt_ids)} tokens {shown}"


def token_line(piece: Piece) -> str:
    """The line of one token: generation, inference and transfer time, bytes sent and received, and its text."""
    return (
        f"🔶 G {piece.generation_ms:.0f} ms I {piece.inference_ms:.0f} ms T {piece.transfer_ms:.0f} ms "
        f"S {piece.sent_bytes / 1000:.0f} kB R {piece.received_bytes / 1000:.0f} kB {visible(piece.text)}"
    )


def visible(text: str) -> str:
    """The text on one line: line breaks and other control characters, which could move the cursor, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def averages(run: Run) -> str:
    """Two lines, prompt and generation: tokens, time for each of them, tokens in a second; "" where nothing ran.

    The pass over the prompt gives the first token along with it, so that the average is over those that follow it.
    """
    if not run.pieces:
        return ""
    decode_ms = [piece.generation_ms for piece in run.pieces[1:]]
    return "\n".join(
        (
            _average("Prompt", len(run.prompt_ids), run.prefill_ms / len(run.prompt_ids)),
            _average("Generation", len(run.pieces), sum(decode_ms) / len(decode_ms) if decode_ms else None),
        )
    )


def _average(phase: str, tokens: int, ms: float | None) -> str:
    speed = f" {ms:9.2f} ms/token {1000 / ms:9.2f} tokens/s" if ms else ""
    return f"{phase:<10} {tokens:5} tokens{speed}"


def statistics(run: Run, llama: Llama) -> dict:
    """The run as plain data, for programs: what `--stats` writes, but for the plan."""
    pieces = run.pieces
    return {
        "prompt_tokens": len(run.prompt_ids),
        "generated_tokens": len(pieces),
        "text": run.text,
        "token_ids": [piece.token_id for piece in pieces],
        "prefill_ms": run.prefill_ms,
        "decode_ms": [piece.generation_ms for piece in pieces],
        "inference_ms": [piece.inference_ms for piece in pieces],
        "transfer_ms": [piece.transfer_ms for piece in pieces],
        "sent_bytes": [piece.sent_bytes for piece in pieces],
        "received_bytes": [piece.received_bytes for piece in pieces],
        "nodes": node_series(pieces),
        "load_ms": llama.load_ms,
        "peak_rss_bytes": peak_rss_bytes(),
        "kernels": llama.kernels,
        "nthreads": llama.nthreads,
        "model": shape(llama.config),
    }


def node_series(pieces: Sequence[Piece]) -> list[dict]:
    """For each node what each token cost it; None for those that it had no part in, the first one among them."""
    costs = [{cost.name: cost for cost in piece.nodes} for piece in pieces]
    names = dict.fromkeys(name for by_name in costs for name in by_name)
    return [
        {"name": name} | {figure: [getattr(by_name.get(name), figure, None) for by_name in costs] for figure in FIGURES}
        for name in names
    ]


def write_statistics(path: str | os.PathLike, values: dict) -> None:
    """Write JSON, the whole file or none. Raises FileError."""
    data = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    with AtomicFile(path, len(data)) as file:
        file.write(data)
