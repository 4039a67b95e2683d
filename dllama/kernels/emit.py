"""The few LLVM building blocks that the kernels are written in.

numba compiles plain loops well, but it cannot name a vector instruction. The inner loops of the products are
therefore emitted as LLVM vector code: a kernel is a Python function that receives an ``Emitter`` and addresses, and
unrolls itself with ordinary Python loops. ``emitted`` turns such a function into something a numba function can call.
Addresses are int64, sizes are bytes, and no load assumes an alignment.
"""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dllama.kernels.tags import TagType

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vec(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def const(kind: ir.Type, value) -> ir.Constant:
    """A constant; for a vector type the value fills every lane."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


class Emitter:
    """llvmlite's builder with the operations the kernels need; every attribute it lacks is the builder's own."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def __getattr__(self, name):
        return getattr(self.builder, name)

    def at(self, address, offset=0):
        """``address + offset``; the offset is a Python int or an i64."""
        if isinstance(offset, int):
            if offset == 0:
                return address
            offset = const(I64, offset)
        return self.builder.add(address, offset)

    def load(self, kind, address, offset=0):
        pointer = self.builder.inttoptr(self.at(address, offset), kind.as_pointer())
        return self.builder.load(pointer, align=1)

    def store(self, value, address, offset=0):
        pointer = self.builder.inttoptr(self.at(address, offset), value.type.as_pointer())
        self.builder.store(value, pointer, align=1)

    def splat(self, value, lanes):
        """The scalar in every lane."""
        empty = ir.Constant(vec(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(empty, value, const(I32, 0))
        return self.builder.shuffle_vector(first, empty, ir.Constant(vec(I32, lanes), [0] * lanes))

    def pick(self, a, indices, b=None):
        """The lanes ``indices`` of a, or of a followed by b."""
        b = ir.Constant(a.type, ir.Undefined) if b is None else b
        return self.builder.shuffle_vector(a, b, ir.Constant(vec(I32, len(indices)), list(indices)))

    def gather(self, kind, addresses):
        """Scalars of one type from several addresses as one vector."""
        out = ir.Constant(vec(kind, len(addresses)), ir.Undefined)
        for i, address in enumerate(addresses):
            out = self.builder.insert_element(out, self.load(kind, address), const(I32, i))
        return out

    def call(self, name, result, *args):
        """A call of an LLVM intrinsic (or C function) by name."""
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(result, [a.type for a in args]), name
        )
        return self.builder.call(function, args)

    def fma(self, a, b, c):
        """a·b + c, in one rounding where the CPU has an instruction for it, else in two."""
        kind = a.type
        name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call(f"llvm.fmuladd.{name}", kind, a, b, c)

    def sum(self, vector):
        """The sum of a float vector's lanes."""
        kind = ir.FunctionType(F32, [F32, vector.type])
        name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [const(F32, 0.0), vector], fastmath=("reassoc",))

    def exact(self):
        """The same operations, each rounded for itself and in the order written: the same bits on every CPU."""
        return _Exact(self.builder)

    def variable(self, value):
        """A mutable value; LLVM keeps it in a register."""
        slot = cgutils.alloca_once_value(self.builder, value)
        return Variable(self.builder, slot)

    def scratch(self, nbytes):
        """The address of ``nbytes`` of zeroed stack."""
        slot = cgutils.alloca_once(self.builder, ir.ArrayType(I8, nbytes), zfill=False)
        slot.align = 64
        self.builder.store(ir.Constant(ir.ArrayType(I8, nbytes), None), slot)
        return self.builder.ptrtoint(slot, I64)

    def loop(self, count):
        """``with emitter.loop(count) as index``: a counted loop, index an i64 from 0."""
        return _Loop(self.builder, count)

    def prefetch(self, address, level):
        """Asks for the cache line at an address, which need not be memory at all, for a level of cache from 1 on."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        read, locality, data = const(I32, 0), const(I32, 4 - level), const(I32, 1)
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, read, locality, data)

    def copy(self, target, source, nbytes):
        cgutils.raw_memcpy(
            self.builder,
            self.builder.inttoptr(target, I8.as_pointer()),
            self.builder.inttoptr(source, I8.as_pointer()),
            nbytes,
            1,
        )


class _Exact(Emitter):
    """numba gives its fast flags to operations that have none; "nsz", that a zero's sign is all the same, keeps them
    off. What it does to calls it does to scalar ones only."""

    def fadd(self, a, b):
        return self.builder.fadd(a, b, flags=("nsz",))

    def fmul(self, a, b):
        return self.builder.fmul(a, b, flags=("nsz",))

    def fdiv(self, a, b):
        return self.builder.fdiv(a, b, flags=("nsz",))

    def fma(self, a, b, c):
        return self.fadd(self.fmul(a, b), c)

    def sum(self, vector):
        while vector.type.count > 1:
            half = vector.type.count // 2
            vector = self.fadd(self.pick(vector, range(half)), self.pick(vector, range(half, 2 * half)))
        return self.builder.extract_element(vector, const(I32, 0))


class Variable:
    def __init__(self, builder, slot):
        self.builder, self.slot = builder, slot

    def get(self):
        return self.builder.load(self.slot)

    def set(self, value):
        self.builder.store(value, self.slot)


class _Loop:
    def __init__(self, builder, count):
        self.context = cgutils.for_range(builder, count)

    def __enter__(self):
        return self.context.__enter__().index

    def __exit__(self, *exc):
        return self.context.__exit__(*exc)


def emitted(result=types.void):
    """Makes a numba-callable function of an emitting one.

    ``f(emitter, *args)`` gets an LLVM value for each argument; arguments that are format tags (``tags.Tag``) arrive
    as the tag itself. It returns the result's LLVM value, or nothing for void.
    """

    def decorate(function):
        def typing(context, *args):
            def codegen(context, builder, signature, values):
                pairs = zip(signature.args, values, strict=True)
                inputs = [kind.tag if isinstance(kind, TagType) else value for kind, value in pairs]
                value = function(Emitter(builder), *inputs)
                return context.get_dummy_value() if result is types.void else value

            return result(*map(_as_argument, args)), codegen

        return intrinsic(functools.update_wrapper(typing, function, updated=()))

    return decorate


def _as_argument(kind):
    """Integers travel as int64 and floats as float32; tags as they are."""
    if isinstance(kind, types.Integer):
        return types.int64
    return types.float32 if isinstance(kind, types.Float) else kind
