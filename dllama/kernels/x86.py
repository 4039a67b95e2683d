"""x86-64: AVX2 and AVX-512 with VNNI."""

from llvmlite import ir

from dllama.kernels.emit import I16, I32, const, vec
from dllama.kernels.isa import HalfInHardware, Isa, Product


class VnniProduct(Product):
    """vpdpbusd: unsigned weights times signed activations, four products added into each int32 lane."""

    def __init__(self, offset: int):
        self.offset = offset  # what makes the weights unsigned

    def accumulate(self, e, state, weights, activations):
        lanes = state.type
        bits = 32 * lanes.count
        # The operand form with 32-bit lanes: LLVM 20 to 22 all take it.
        name = f"llvm.x86.avx512.vpdpbusd.{bits}"
        return e.call(name, lanes, state, e.bitcast(weights, lanes), e.bitcast(activations, lanes))


class VnniNibbles(VnniProduct):
    """High nibbles stay where they are in their bytes, which makes them sixteen times as large, and have a sum of their
    own, shifted once at the end: a shift less for every vector of weights."""

    def __init__(self):
        super().__init__(offset=0)

    def begin(self, e, start):
        return start, const(start.type, 0)

    def accumulate_nibbles(self, e, state, stored, low, high):
        ones, sixteens = state
        ones = self.accumulate(e, ones, e.and_(stored, const(stored.type, 0x0F)), low)
        return ones, self.accumulate(e, sixteens, e.and_(stored, const(stored.type, 0xF0)), high)

    def finish(self, e, state):
        ones, sixteens = state
        return e.add(ones, e.ashr(sixteens, const(sixteens.type, 4)))


class Avx2Nibbles(Product):
    """vpmaddubsw sums pairs into int16 lanes, which hold all 8 steps; one vpmaddwd at the end widens them."""

    def begin(self, e, start):
        return start, const(vec(I16, 2 * start.type.count), 0)

    def accumulate(self, e, state, weights, activations):
        start, pairs = state
        return start, e.add(pairs, _maddubs(e, weights, activations))

    def finish(self, e, state):
        start, pairs = state
        return e.add(start, _madd_ones(e, pairs))


class Avx2Int8(Product):
    """|w| times a with w's sign, because vpmaddubsw wants one side unsigned; 2·128·127 still fits in int16."""

    def accumulate(self, e, state, weights, activations):
        magnitude = e.call("llvm.x86.avx2.psign.b", weights.type, weights, weights)
        signed = e.call("llvm.x86.avx2.psign.b", weights.type, activations, weights)
        return e.add(state, _madd_ones(e, _maddubs(e, magnitude, signed)))


def _maddubs(e, unsigned, signed):
    return e.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), unsigned, signed)


def _madd_ones(e, pairs):
    return e.call("llvm.x86.avx2.pmadd.wd", vec(I32, 8), pairs, const(pairs.type, 1))


class _X86(HalfInHardware, Isa):
    ahead = (8192, 2), (1024, 1)

    def pause(self, e):
        e.call("llvm.x86.sse2.pause", ir.VoidType())


class Avx2(_X86):
    name = "avx2"
    vector = 32
    tile_tokens = 4
    nibbles = Avx2Nibbles()
    int8 = Avx2Int8()


class Avx512(_X86):
    name = "avx512"
    vector = 64
    tile_tokens = 8
    float_sums = 16
    nibbles = VnniProduct(offset=0)
    int8 = VnniProduct(offset=128)

    def nibbles_for(self, tokens):
        return VnniNibbles() if tokens > 2 else self.nibbles  # one and two wait for memory, and gain nothing
