"""The pickle inside a torch checkpoint, read without running anything.

A pickle is a program: `pickle.load` imports and calls what it names. Here its opcodes (the standard library's
``pickletools`` parses them) move plain values on a stack; of names only those of NAMES are known, and "calling" one
makes a description of a tensor. Everything else is refused, so a checkpoint cannot do more than state its tensors.
"""

import io
import pickletools
from typing import NamedTuple

STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""torch's storage classes -> dtype, named as in safetensors."""

DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
NAMES = {DICT, TENSOR, PARAMETER, *(f"torch {name}" for name in STORAGES)}
MARK = object()


class Name(NamedTuple):
    """A module and a name in it, as the pickle gives them; only ever compared."""

    text: str


class Storage(NamedTuple):
    """A run of numbers of one dtype in a file of the archive."""

    dtype: str
    key: str
    count: int


class View(NamedTuple):
    """A tensor: a part of a storage. Offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state(data: bytes) -> dict[str, View]:
    """The tensors that the pickle names. ValueError, with the reason, for anything but a state dict."""
    try:
        state = _run(data)
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError):  # too little on the stack, or other kinds
        raise ValueError("damaged: its pickle makes no sense") from None
    if not isinstance(state, dict) or not state:
        raise ValueError("not a checkpoint: it holds no dictionary of tensors")
    for name, value in state.items():
        if not isinstance(value, View):
            raise ValueError(f"not a checkpoint: its entry {name[:60]} is not a tensor")
    return state


def _run(data: bytes):
    """What the pickle leaves on its stack at the end."""
    stack, memo = [], {}

    def since_mark() -> list:
        values = []
        while (value := stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    for opcode, argument, _ in _opcodes(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                values = since_mark()
                _set(stack[-1], values)
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                values = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                if type(stack[-1]) is not list:
                    raise TypeError
                stack[-1].extend(values)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:
                    raise TypeError
                stack.append(_name(f"{module} {name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_call(name, arguments))
            case "BUILD":
                stack.pop()  # the versions of the modules, which torch hangs on the dictionary
                if type(stack[-1]) is not dict:
                    raise TypeError
            case _:
                raise ValueError(f"refused: its pickle uses {opcode.name}, which a checkpoint has no need of")
    raise ValueError("damaged: its pickle has no end")


def _opcodes(data: bytes):
    opcodes = pickletools.genops(io.BytesIO(data))
    while True:
        try:
            yield next(opcodes)
        except StopIteration:
            return
        except (ValueError, EOFError, UnicodeDecodeError):
            raise ValueError("damaged: its pickle cannot be parsed") from None


def _set(target, flat: list) -> None:
    """target[key] = value for each of key, value, key, value, ..."""
    if type(target) is not dict or len(flat) % 2:
        raise TypeError
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if type(key) is not str:  # a tuple of tuples of tuples would be hashed to its depths
            raise ValueError("not a checkpoint: a dictionary in it has a key that is no text")
        target[key] = value


def _name(text: str) -> Name:
    if text not in NAMES:
        raise ValueError(
            f"refused: its pickle asks for {text.replace(' ', '.')[:80]}, which no checkpoint needs (nothing was run)"
        )
    return Name(text)


def _storage(identity) -> Storage:
    """A storage from its persistent id: ("storage", class, key, device, number of elements)."""
    if type(identity) is not tuple or len(identity) != 5:
        raise TypeError
    kind, storage_class, key, _, count = identity
    dtype = STORAGES.get(storage_class.text.removeprefix("torch "))
    if kind != "storage" or dtype is None or type(key) is not str or not _is_natural(count):
        raise TypeError
    return Storage(dtype, key, count)


def _call(name: Name, arguments: tuple):
    """What torch would make: an empty dictionary, or a tensor's description."""
    if name.text == DICT and arguments == ():
        return {}
    if name.text == PARAMETER and type(arguments[0]) is View:
        return arguments[0]
    if name.text != TENSOR or len(arguments) < 4:
        raise TypeError
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is not Storage or not _is_natural(offset) or len(shape) != len(strides):
        raise TypeError
    if not all(type(numbers) is tuple and all(map(_is_natural, numbers)) for numbers in (shape, strides)):
        raise TypeError
    return View(storage, offset, shape, strides)


def _is_natural(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
