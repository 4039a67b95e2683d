"""Who sends its part to whom in an exchange, round by round.

After the attention and after the FFN of each layer the nodes sum their parts of the residual stream in one of these
forms:

**full mesh**: everyone sends its whole part to everyone else, and sums by itself. One round.
**butterfly** (recursive doubling: Thakur, Rabenseifner and Gropp 2005, section 4.4; here of any factors): n nodes are
f·g·… nodes, and a full mesh sums over f at a time, then over g of these sums, and so on. A round for each prime factor
of n, with fewer messages: 8 nodes send 3 each in place of 7.
**fold**: as many nodes as the largest power of two below n are a butterfly. Each of the others has a partner there,
sends its part to it before, and gets the sum from it after: the nodes that messages cost most send one and get one.
(For n that is no power of two it is the same article's way, section 4.4, of two messages more for the partners.)
**reduce-scatter and all-gather**: everyone sends to each node the values that this one sums, then gets its sums. Two
rounds, of 2/n of the bytes each node would send to the mesh. It has no meetings here, as the parts that travel are not
whole.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple


class Form(enum.Enum):
    """How parts of the residual stream are summed."""

    MESH = "full mesh"
    BUTTERFLY = "butterfly"
    FOLD = "folded butterfly"
    SCATTER = "reduce-scatter and all-gather"


class Meeting(NamedTuple):
    """What a round is to one node: who gets its part, whose parts it gets, and the parts that it sums, in this order,
    its own among them as it travels. Where it sums none its part stays as it is."""

    to: tuple[int, ...] = ()
    of: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()


def meetings(form: Form, order: Sequence[int], node: int) -> list[Meeting]:
    """A node's rounds of an exchange, as many as every other node has. After the last one all have the same bits.

    order: the numbers of all nodes, those first that shall have most to do with messages. Only a fold looks at it:
    elsewhere all have as many, and the sums shall not depend on what was measured.
    """
    if form is Form.FOLD:
        core = 1 << (len(order) - 1).bit_length() - 1
        return _folded(order[:core], order[core:], node)
    nodes = sorted(order)
    sizes = [len(nodes)] if form is Form.MESH else factors(len(nodes))
    return [_mesh([nodes[i] for i in group], node) for group in _groups(nodes.index(node), sizes)]


def partner_of(form: Form, order: Sequence[int], node: int) -> int | None:
    """Who takes a node's part along in a fold; None for a node that meets others itself."""
    if form is not Form.FOLD:
        return None
    meeting = meetings(form, order, node)[0]
    return meeting.to[0] if meeting.to else None


def factors(n: int) -> list[int]:
    """The prime factors of n, the smallest first."""
    found, factor = [], 2
    while n > 1:
        while n % factor == 0:
            found.append(factor)
            n //= factor
        factor += 1
    return found


def _mesh(group: Sequence[int], node: int) -> Meeting:
    others = tuple(other for other in group if other != node)
    return Meeting(others, others, tuple(group))


def _folded(core: Sequence[int], others: Sequence[int], node: int) -> list[Meeting]:
    partners = dict(zip(others, core, strict=False)) | dict(zip(core, others, strict=False))
    partner = partners.get(node)
    met = () if partner is None else (partner,)
    if node not in core:
        return [Meeting(to=met), *[Meeting()] * len(factors(len(core))), Meeting(of=met, summed=met)]
    # In the end all take the sum as it travels.
    first = Meeting(of=met, summed=(node, *met)) if met else Meeting()
    return [first, *meetings(Form.BUTTERFLY, core, node), Meeting(to=met, summed=(node,))]


def _groups(place: int, sizes: Sequence[int]) -> list[list[int]]:
    """The places of the nodes that sum with the one at this place, itself included, round by round.

    A place is read in the mixed radix of these sizes; in each round the nodes meet that differ in one digit.
    """
    groups, step = [], 1
    for size in sizes:
        first = place - place // step % size * step
        groups.append(list(range(first, first + size * step, step)))
        step *= size
    return groups
