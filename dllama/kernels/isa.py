"""What differs between CPUs, behind one small interface.

Everything the kernels need from a CPU is a **product of small integers**: lanes of int32, each gaining the sum of four
neighbouring products of weights and activations. An ``Isa`` offers two of them, ``nibbles`` for weights 0..15 (Q40
before its offset of 8 is taken off) and ``int8`` for weights -128..127, together with the vector width and the number
of registers to spend. The rest (loads, conversions, fused multiply-adds) LLVM lowers from generic vector code.

A product runs over at most 8 ``accumulate`` calls between ``begin`` and ``finish``, so that an implementation may
keep int16 partial sums: 8·2·15·127 = 30480 fits.
"""

from dllama.kernels.emit import F16, F32, I8, I16, I32, const, vec


class Product:
    """Weights times activations, generic form: widen, multiply, add neighbours. Runs on any CPU."""

    offset = 0
    """What the weights given to ``accumulate`` exceed the true ones by; nibbles always by 8."""

    def begin(self, e, start):
        """A state from int32 lanes, one for every four bytes of a vector."""
        return start

    def accumulate(self, e, state, weights, activations):
        """state[i] += Σ_{t<4} weights[4i+t] · activations[4i+t]; both int8 vectors."""
        lanes = weights.type.count
        wide = vec(I32, lanes)
        products = e.mul(e.sext(weights, wide), e.sext(activations, wide))
        for _ in range(2):
            lanes //= 2
            even, odd = e.pick(products, range(0, 2 * lanes, 2)), e.pick(products, range(1, 2 * lanes, 2))
            products = e.add(even, odd)
        return e.add(state, products)

    def accumulate_nibbles(self, e, state, stored, low, high):
        """As ``accumulate`` with the low nibbles of a vector of bytes, and then with the high ones."""
        state = self.accumulate(e, state, e.and_(stored, const(stored.type, 15)), low)
        return self.accumulate(e, state, e.lshr(stored, const(stored.type, 4)), high)

    def finish(self, e, state):
        """The int32 lanes of a state."""
        return state


class Isa:
    """The plain form, and the base of the others."""

    name = "plain"
    vector = 16
    """Bytes of a vector register."""
    tile_tokens = 4
    """Tokens that the matrix-matrix product works on at once."""
    tile_vectors = 1
    """Vectors of weight rows that it works on at once."""
    float_sums = 4
    """Vectors of 16 float sums that its registers hold beside what is multiplied."""
    ahead: tuple[tuple[int, int], ...] = ()
    """Where several tokens keep the CPU busy: how many bytes ahead of their use weights are asked for, and for which
    level of cache."""
    nibbles = Product()
    int8 = Product()

    def nibbles_for(self, tokens):
        """The product of ``nibbles`` that is fastest with so many tokens."""
        return self.nibbles

    def quads(self, e, address):
        """The 8 groups of four neighbouring int8 at an address, each in all lanes of a vector."""
        return [bytes_of(e, e.load(I32, address, 4 * i), self.vector) for i in range(8)]

    def half_to_float(self, e, half_bits):
        """int16 lanes holding IEEE half bits → float32 lanes, without an instruction for it.

        Shifts exponent and mantissa into place and multiplies by 2^112, which also puts subnormals right;
        infinities and NaN come out as large finite numbers (no valid file holds them as scales).
        """
        wide = vec(I32, half_bits.type.count)
        bits = e.zext(half_bits, wide)
        magnitude = e.shl(e.and_(bits, const(wide, 0x7FFF)), const(wide, 13))
        floats = vec(F32, half_bits.type.count)
        value = e.bitcast(e.fmul(e.bitcast(magnitude, floats), const(floats, 2.0**112)), wide)
        return e.bitcast(e.or_(value, e.shl(e.and_(bits, const(wide, 0x8000)), const(wide, 16))), floats)

    def float_to_half(self, e, values):
        """float32 lanes, magnitude at most 65504 → int16 lanes of IEEE half bits, rounded to nearest even.

        Adding a power of two whose last mantissa bit has the weight of the half's last bit makes the addition
        round; below 2^-14 that weight is fixed at 2^-24 (subnormals).
        """
        lanes = values.type.count
        wide, floats = vec(I32, lanes), vec(F32, lanes)
        bits = e.bitcast(values, wide)
        sign = e.lshr(e.and_(bits, const(wide, -0x80000000)), const(wide, 16))
        magnitude = e.bitcast(e.and_(bits, const(wide, 0x7FFFFFFF)), floats)
        exponent = e.and_(e.bitcast(magnitude, wide), const(wide, 0x7F800000))
        floor = const(wide, (127 - 14) << 23)
        exponent = e.select(e.icmp_signed(">", exponent, floor), exponent, floor)
        magic = e.bitcast(e.add(exponent, const(wide, 13 << 23)), floats)
        rounded = e.sub(e.bitcast(e.fadd(magnitude, magic), wide), e.bitcast(magic, wide))
        biased = e.sub(e.lshr(exponent, const(wide, 13)), const(wide, (127 - 14) << 10))
        return e.trunc(e.or_(e.add(rounded, biased), sign), vec(I16, lanes))

    def pause(self, e):
        """A hint that the thread is spinning."""


class HalfInHardware:
    """Mixed into CPUs that convert between half and single precision."""

    def half_to_float(self, e, half_bits):
        lanes = half_bits.type.count
        return e.fpext(e.bitcast(half_bits, vec(F16, lanes)), vec(F32, lanes))

    def float_to_half(self, e, values):
        lanes = values.type.count
        return e.bitcast(e.fptrunc(values, vec(F16, lanes)), vec(I16, lanes))


def bytes_of(e, word, lanes):
    """An i32 broadcast to ``lanes`` int8."""
    return e.bitcast(e.splat(word, lanes // 4), vec(I8, lanes))
