"""The two ways to write down byte-pair merges: a list of pairs, best first, and a score for each piece.

A list is what Hugging Face's `tokenizer.json` and GGUF hold, scores what a `.t` file holds. One follows from the other,
for the only pair that ever makes a piece is the last one of the piece's own merging.
"""

from collections.abc import Iterable

from dllama.formats.vocabulary import UNMERGED
from dllama.tokenizer.merge import merge


def merge_scores(merges: list, tokens: dict[str, int]) -> dict[int, float]:
    """id -> score: the place of the first merge that makes a piece, negated.

    merges: pairs of tokens, as lists or with a space between, best first;  tokens: token -> id
    A token of several characters that no merge makes is UNMERGED; single characters have no score. ValueError for what
    is no pair, or makes no token.
    """
    scores: dict[int, float] = {}
    for place, pair in enumerate(merges):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"merge {place} is {pair!r}, not a pair")
        made = tokens.get(parts[0] + parts[1])
        if made is None:
            raise ValueError(f"merge {place} makes {parts[0] + parts[1]!r}, which is no token")
        scores.setdefault(made, -float(place + 1))
    for token, i in tokens.items():
        if len(token) > 1:
            scores.setdefault(i, UNMERGED)
    return scores


def merge_list(pieces: Iterable[bytes], scores: Iterable[float]) -> list[tuple[bytes, bytes]]:
    """The pairs that make the pieces of a byte-level vocabulary, best first.

    A piece that its own merging does not reach has no pair: nothing makes it.
    """
    ids, places = {}, []
    for i, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        places.append(score)
        if score > UNMERGED:
            ids.setdefault(piece, i)
    longest = max(map(len, ids), default=0)
    pairs = []
    for piece in sorted(ids, key=lambda piece: (-places[ids[piece]], ids[piece])):
        if len(piece) > 1:
            own = ids.pop(piece)
            symbols = merge([piece[i : i + 1] for i in range(len(piece))], ids, places, longest)
            ids[piece] = own
            if len(symbols) == 2:
                pairs.append((symbols[0], symbols[1]))
    return pairs
