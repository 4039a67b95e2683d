"""What can PrivateLoRA's cloud find out? Tokens from the hidden states that it gets, and M from the edge's answers.

    pip install '.[bench,train]'
    python -m bench.inversion
    python -m bench.inversion --model FOLDER --splits 0 1 4 --texts 8

The edge works the first a decoder layers of a base model that the cloud has as well, adds noise to what leaves them and
rounds it. Four attacks guess the tokens of texts that they have not seen: the nearest entry of a table of states (for
a = 0: of the embeddings), a linear probe and a perceptron that sees neighbouring states, both trained on --train, and a
search that runs candidates through the base's first layers. Beside the share of tokens that each recovers stands the
price, the perplexity of the model on the same text with the same noise. The first token of a text is not counted.

Adapters are left out: with one in the edge's own layers, which the cloud does not know, the attacks are weaker.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.inversion_adapter import NEW_ROWS, recovery
from bench.inversion_attacks import Inverter, PrefixSearch, distances
from bench.inversion_model import SplitModel, query_inputs, transmit
from bench.inversion_plot import curves
from bench.report import RESULTS, print_table, save
from dllama.formats import FloatType
from dllama.tokenizer import Tokenizer
from dllama.train.base_model import BaseModel, load_base
from dllama.train.corpus import read_problems

DATA = Path("../shared/data")
CASES = [("F32", 0.0), *(("Q80", sigma) for sigma in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0))]
ATTACKS = ("nearest", "linear", "perceptron", "search")
LINEAR_STEPS, PERCEPTRON_STEPS = 120, 400
HIDDEN, BEFORE, AFTER = 256, 2, 1
FORMS = FloatType.F32, FloatType.F16, FloatType.Q80
RANKS, ROWS = (16, 128), (0.5, 1, 1.25, 2, 4)  # of M; rows that the cloud has seen, as multiples of the rank


def texts_of(path: Path, tokenizer: Tokenizer, length: int, count: int) -> torch.Tensor:
    """Beginnings of a .jsonl file's GSM8K problems, or pieces of another file: int64 [count or fewer, length]."""
    if path.suffix == ".jsonl":
        found = (tokenizer.encode(problem) for problem in read_problems(path))
        whole = (tokens[:length] for tokens in found if len(tokens) >= length)
        rows = [tokens for tokens, _ in zip(whole, range(count), strict=False)]
    else:
        head = tokenizer.encode("")
        tokens, size = tokenizer.encode(path.read_text(encoding="utf-8"), bos=False), length - len(head)
        spread = max(len(tokens) // count, size)  # pieces from all over the file
        rows = [head + tokens[at : at + size] for at in range(0, len(tokens) - size, spread)][:count]
    if not rows:
        raise SystemExit(f"{path}: no text of {length} tokens")
    return torch.tensor(rows)


def share(guessed: torch.Tensor, tokens: torch.Tensor) -> float:
    """Of the tokens behind the first of each text."""
    return float((guessed == tokens)[:, 1:].float().mean())


def attack(
    base: BaseModel, splits: Sequence[int], known: torch.Tensor, texts: dict[str, torch.Tensor], search: dict
) -> Iterator[dict]:
    """One finding for each split, case and text: its names, the shares, the perplexity.

    known: the attacker's texts;  search: settings of the search
    """
    begin = int(known[0, 0])
    sigmas = sorted({sigma for _, sigma in CASES})
    vocabulary, dim = base.model.get_input_embeddings().weight.shape
    for layers in splits:
        split = SplitModel(base.model, layers)
        prefix_search = PrefixSearch(split, begin, **search)
        states = split.states(known)
        clean = {name: split.states(tokens) for name, tokens in texts.items()}
        tell(f"{layers} layers on the edge: training the perceptron")
        perceptron = Inverter(dim, vocabulary, HIDDEN, BEFORE, AFTER)
        perceptron.fit(states, known, sigmas, PERCEPTRON_STEPS, 2e-3)
        linear = {sigma: Inverter(dim, vocabulary) for sigma in sigmas}
        for sigma, probe in linear.items():
            tell(f"{layers} layers on the edge: training the linear probe, noise {sigma:g}")
            probe.fit(states, known, [sigma], LINEAR_STEPS, 1e-2)
        for number, (form, sigma) in enumerate(CASES):
            for name, tokens in texts.items():
                tell(f"{layers} layers on the edge, {form}, noise {sigma:g}, {name}: attacks")
                random = torch.Generator().manual_seed(1000 * layers + number)
                sent = transmit(clean[name], sigma, FloatType.parse(form), random)
                guesses = {
                    "nearest": distances(sent, prefix_search.table).argmin(-1),
                    "linear": linear[sigma].guess(sent, sigma),
                    "perceptron": perceptron.guess(sent, sigma),
                    "search": prefix_search(sent, sigma),
                }
                yield {
                    "edge_layers": layers,
                    "form": form,
                    "noise": sigma,
                    "text": name,
                    "perplexity": split.perplexity(sent, tokens),
                    "recovered": {attack: share(guesses[attack], tokens) for attack in ATTACKS},
                }


def adapters(base: BaseModel, tokens: torch.Tensor) -> list[dict]:
    """How well M is known to a cloud that has seen so many rows, in the layer in the middle."""
    layer = base.model.config.num_hidden_layers // 2
    x = query_inputs(base.model, layer, tokens).numpy()
    found = []
    for rank in RANKS:
        for rows in (int(factor * rank) for factor in ROWS):
            if rows + NEW_ROWS > len(x):
                raise SystemExit(f"--train has {len(x)} tokens, and {rows + NEW_ROWS} are needed")
            errors = {form.name: recovery(x, rank, rows, form) for form in FORMS}
            found.append({"rank": rank, "rows": rows, "errors": errors})
    return found


def tell(what: str) -> None:
    print(f"{time.perf_counter() - START:5.0f} s  {what}", file=sys.stderr, flush=True)


def show(findings: list[dict], adapted: list[dict], chance: dict[str, float]) -> None:
    for name, level in chance.items():
        print(f"\nTokens of {name} recovered; guessing the commonest token: {100 * level:.1f} %\n")
        rows = [
            (
                each["edge_layers"],
                each["form"],
                f"{each['noise']:g}",
                *(f"{100 * each['recovered'][attack]:.1f} %" for attack in ATTACKS),
                f"{each['perplexity']:.2f}",
            )
            for each in findings
            if each["text"] == name
        ]
        print_table(("layers on the edge", "sent as", "noise", *ATTACKS, "perplexity"), rows)
    print("\nM solved from what the cloud sends and gets: relative error of its answers to rows not yet seen\n")
    forms = adapted[0]["errors"]
    rows = [(each["rank"], each["rows"], *(f"{each['errors'][form][1]:.1e}" for form in forms)) for each in adapted]
    print_table(("rank", "rows seen", *forms), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder or .m file, default the embedded model")
    parser.add_argument("--tokenizer", type=Path, help="of a .m file")
    parser.add_argument(
        "--splits", type=int, nargs="+", metavar="A", help="layers on the edge, default none to half of them"
    )
    parser.add_argument("--train", type=Path, default=DATA / "gsm8k_train.jsonl", help="the attacker's text")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[DATA / "gsm8k_test.jsonl", DATA / "shakespeare.txt"], metavar="FILE"
    )
    parser.add_argument("--texts", type=int, default=8, help="of each file, default %(default)s")
    parser.add_argument("--length", type=int, default=64, help="tokens of each, default %(default)s")
    parser.add_argument("--beam", type=int, default=2, help="texts that the search keeps, default %(default)s")
    parser.add_argument("--shortlist", type=int, default=48, help="tokens that it tries first, default %(default)s")
    parser.add_argument("--threads", type=int, help="default: all cores; fewer are faster beside other work")
    parser.add_argument("--name", default="inversion", help="name of the results file, without .json")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    base = load_base(options.model, options.tokenizer, torch.float32)
    n_layers = base.model.config.num_hidden_layers
    splits = options.splits or range(n_layers // 2 + 1)
    if not all(0 <= layers < n_layers for layers in splits):
        raise SystemExit(
            f"--splits: 0 to {n_layers - 1}, as the model has {n_layers} layers and the cloud some of them"
        )
    known = texts_of(options.train, base.tokenizer, options.length, 3000)
    texts = {path.name: texts_of(path, base.tokenizer, options.length, options.texts) for path in options.text}
    common = known[:, 1:].flatten().mode().values
    chance = {name: share(common.expand(tokens.shape), tokens) for name, tokens in texts.items()}
    search = {"beam": options.beam, "shortlist": options.shortlist}
    findings = list(attack(base, splits, known, texts, search))
    adapted = adapters(base, known[:64])

    show(findings, adapted, chance)
    results = {
        "question": "inversion",
        "model": Path(base.name).name,
        "train": [options.train.name, *known.shape],
        "texts": {name: list(tokens.shape) for name, tokens in texts.items()},
        "search": search,
        "commonest": chance,
        "found": findings,
        "adapter": adapted,
    }
    save(options.name, results)
    curves(RESULTS / f"{options.name}.png", findings, chance)


START = time.perf_counter()

if __name__ == "__main__":
    main()
