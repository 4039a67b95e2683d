"""Compile-time choices: a tag passed to a compiled function selects what the function is compiled for.

A weight matrix may be Q40, Q80, F16 or F32, a KV cache F16, F32 or Q80. Each choice is a tag, an argument without
run-time value whose *type* differs, so numba compiles one lean function for each combination in use and no other.
"""

from dataclasses import dataclass

from numba import types
from numba.core.imputils import lower_constant
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox


@dataclass(frozen=True)
class Tag:
    """A storage format, as the kernels see it. ``block``: values in a block; ``nbytes``: bytes of a block."""

    name: str
    block: int
    nbytes: int


class TagType(types.Type):
    def __init__(self, tag: Tag):
        self.tag = tag
        super().__init__(name=f"Tag({tag.name})")


register_model(TagType)(models.OpaqueModel)


@typeof_impl.register(Tag)
def _typeof_tag(tag, context):
    return TagType(tag)


@unbox(TagType)
def _unbox_tag(kind, tag, c):
    return NativeValue(c.context.get_dummy_value())


@lower_constant(TagType)
def _lower_tag(context, builder, kind, tag):
    return context.get_dummy_value()


F32 = Tag("f32", 1, 4)
F16 = Tag("f16", 1, 2)
Q40 = Tag("q40", 32, 18)
Q80 = Tag("q80", 32, 34)
BY_NAME = {tag.name: tag for tag in (F32, F16, Q40, Q80)}
