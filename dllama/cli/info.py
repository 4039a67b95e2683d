"""`dllama info`: what a file is, and what memory a model takes."""

import json
import os
from collections import defaultdict

import click

from dllama.cli import options
from dllama.cli.shape import shape
from dllama.engine.memory import in_units, needed_bytes
from dllama.errors import FormatError, ModelError
from dllama.formats import header
from dllama.formats.blocks import FloatType
from dllama.formats.files import open_regular
from dllama.formats.manifest import read_manifest
from dllama.formats.model import ModelFile
from dllama.formats.vocabulary import tokenizer_kind
from dllama.tokenizer import load_tokenizer

PARTS = {
    "embedding": "embedding",
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    "router": "routers",
    **dict.fromkeys(("w1", "w2", "w3"), "feed-forward"),
    **dict.fromkeys(("q_norm", "k_norm", "attention_norm", "ffn_norm", "final_norm"), "norms"),
    "output": "output",
}


class IntegerList(click.ParamType):
    """Positive integers with commas between them."""

    name = "integers"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        numbers = value.split(",")
        if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
            self.fail(f"{value!r} is not a list of positive numbers such as 512,2048", param, ctx)
        return tuple(int(number) for number in numbers)


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--context", type=IntegerList(), metavar="N,...", help="Context lengths to tell the memory needed for.")
@click.option("--nodes", type=IntegerList(), default=(1, 2, 4), metavar="N,...", help="Node counts. [default: 1,2,4]")
@options.kv_float_type("Type of the KV cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(file, context, nodes, kv_float_type, as_json) -> None:
    """Show what a model or tokenizer FILE holds.

    For a model: its shape, the size of its parts, and the memory that a node needs; and, where the manifest that
    dllama-convert wrote lies beside it, the files that it was made from.

    \b
      dllama info model.m
      dllama info model.m --context 2048,8192 --nodes 1,2,4,8 --kv-float-type q80
      dllama info tokenizer.t
    """
    if _is_model(file):
        values = model_values(file, context, nodes, FloatType.parse(kv_float_type))
        text = _model_text
    else:
        values = tokenizer_values(file)
        text = _tokenizer_text
    click.echo(json.dumps(values, indent=2, ensure_ascii=False) if as_json else text(values))


def _is_model(path: str) -> bool:
    """Whether the file says so, by its first bytes or by its name; all others are taken for tokenizers."""
    with open_regular(path) as file:
        magic = int.from_bytes(file.read(4), "little")
    return magic in (header.MAGIC, header.OLD_MAGIC) or path.endswith(".m")


def model_values(path: str, contexts: tuple[int, ...] | None, nodes: tuple[int, ...], kv_type: FloatType) -> dict:
    """All that the command tells of a model; sizes in bytes. Raises FileError, ModelError."""
    with ModelFile(path) as file:
        config, nbytes, tensors = file.config, file.nbytes, list(file.tensors())
    too_long = [context for context in contexts or () if context > config.seq_len]
    if too_long:
        raise ModelError(f"{path}: the model's context is {config.seq_len} tokens, and {too_long[0]} were asked for")
    parts = defaultdict(int)
    for tensor in tensors:
        parts[PARTS[tensor.kind]] += tensor.nbytes
    return {
        "file": path,
        "bytes": nbytes,
        "parameters": sum(tensor.rows * tensor.columns for tensor in tensors),
        "model": shape(config),
        "parts": parts,
        "kv_float_type": kv_type.name.lower(),
        "memory": [
            {"context": context, "nodes": n, "bytes": needed_bytes(config, context, kv_type, n)}
            for context in contexts or _usual_contexts(config.seq_len)
            for n in nodes
        ],
        "manifest": _manifest(path),
    }


def _manifest(path: str) -> dict | None:
    """The model's manifest; one that is damaged or of another file is told of, and left out."""
    try:
        return read_manifest(path)
    except FormatError as error:
        click.echo(f"{error}", err=True)
        return None


def _usual_contexts(seq_len: int) -> list[int]:
    return [*(context for context in (512, 2048, 8192) if context < seq_len), seq_len]


def _model_text(values: dict) -> str:
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values["model"].items()}
    rows = [(_label(name), value) for name, value in shown.items() if value != "0"]
    sizes = [(name, in_units(size), f"{100 * size / values['bytes']:.1f} %") for name, size in values["parts"].items()]
    nodes = sorted({entry["nodes"] for entry in values["memory"]})
    needs = defaultdict(dict)
    for entry in values["memory"]:
        needs[entry["context"]][entry["nodes"]] = in_units(entry["bytes"])
    memory = [("context", *("1 node" if n == 1 else f"{n} nodes" for n in nodes))]
    memory += [(str(context), *(row[n] for n in nodes)) for context, row in needs.items()]
    return (
        f"{values['file']}: {values['parameters']:,} parameters, {in_units(values['bytes'])}\n\n"
        f"{table(rows)}\n\n"
        f"{table(sizes)}\n\n"
        f"Memory that each node needs, KV cache in {values['kv_float_type']}\n"
        f"{table(memory)}"
        f"{_origin_text(values['manifest'])}"
    )


def _origin_text(manifest: dict | None) -> str:
    """Where the model came from; nothing where that is not known."""
    if manifest is None:
        return ""
    source = manifest["source"]
    files = [(file["name"], in_units(file["bytes"]), f"sha256 {file['sha256']}") for file in source["files"]]
    return (
        f"\n\nConverted from the {source['kind']} {source['name']} by {manifest['converter']}, "
        f"{manifest['weights']} by {manifest['quantiser']}\n"
        f"{table(files)}"
    )


def _label(name: str) -> str:
    return name.removeprefix("n_").replace("_", " ")


def tokenizer_values(path: str) -> dict:
    """All that the command tells of a tokenizer. Raises FileError."""
    tokenizer = load_tokenizer(path)
    with open_regular(path) as file:
        kind = tokenizer_kind(file.read(4))
    return {
        "file": path,
        "bytes": os.path.getsize(path),
        "kind": kind,
        "vocabulary": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
        "chat_template": tokenizer.chat_template,
    }


def _tokenizer_text(values: dict) -> str:
    rows = [
        ("kind", values["kind"]),
        ("vocabulary", str(values["vocabulary"])),
        ("bos id", str(values["bos_id"])),
        ("eos ids", ", ".join(map(str, values["eos_ids"])) or "none"),
        ("chat template", f"{len(values['chat_template'])} characters" if values["chat_template"] else "none"),
    ]
    return f"{values['file']}: tokenizer, {in_units(values['bytes'])}\n\n{table(rows)}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as lines, columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
