"""64-bit Arm: NEON with the dot product extension (Raspberry Pi 5) and without (Raspberry Pi 4)."""

from llvmlite import ir

from dllama.kernels.emit import I8, I16, I32, const, vec
from dllama.kernels.isa import HalfInHardware, Isa, Product


class DotProduct(Product):
    """sdot: four signed products added into each int32 lane; nibbles 0..15 are fine as signed bytes."""

    def accumulate(self, e, state, weights, activations):
        return e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", vec(I32, 4), state, weights, activations)


class NeonNibbles(Product):
    """smlal into int16 lanes for the two halves of a vector, which hold all 8 steps; widened once at the end."""

    def begin(self, e, start):
        return start, const(vec(I16, 8), 0), const(vec(I16, 8), 0)

    def accumulate(self, e, state, weights, activations):
        start, low, high = state
        low = e.add(low, _multiply(e, weights, activations, 0))
        return start, low, e.add(high, _multiply(e, weights, activations, 8))

    def finish(self, e, state):
        start, low, high = state
        return e.add(start, _add_pairs(e, low, high))


class NeonInt8(Product):
    """smull of each half, pairs added in int32 at every step, since two full products already fill an int16."""

    def accumulate(self, e, state, weights, activations):
        halves = []
        for first in (0, 8):
            products = _multiply(e, weights, activations, first)
            halves.append(e.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", vec(I32, 4), products))
        return e.add(state, e.call("llvm.aarch64.neon.addp.v4i32", vec(I32, 4), *halves))


def _multiply(e, weights, activations, first):
    lanes = range(first, first + 8)
    return e.call("llvm.aarch64.neon.smull.v8i16", vec(I16, 8), e.pick(weights, lanes), e.pick(activations, lanes))


def _add_pairs(e, low, high):
    """Sums of four neighbours of low, then of high: 2·8·2·15·127/2 fits the int16 of the first step."""
    pairs = e.call("llvm.aarch64.neon.addp.v8i16", vec(I16, 8), low, high)
    return e.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", vec(I32, 4), pairs)


class _Arm(HalfInHardware, Isa):
    vector = 16
    tile_tokens = 4
    tile_vectors = 2

    def quads(self, e, address):
        """Two loads, and then lanes of them, which the products can name: fewer loads than eight broadcasts."""
        halves = [e.bitcast(e.load(vec(I8, 16), address, first), vec(I32, 4)) for first in (0, 16)]
        return [e.bitcast(e.pick(h, [i] * 4), vec(I8, 16)) for h in halves for i in range(4)]

    def pause(self, e):
        e.call("llvm.aarch64.isb", ir.VoidType(), const(I32, 15))  # yield does nothing on Cortex-A


class NeonDotprod(_Arm):
    name = "neon-dotprod"
    nibbles = DotProduct()
    int8 = DotProduct()


class Neon(_Arm):
    name = "neon"
    nibbles = NeonNibbles()
    int8 = NeonInt8()
