"""Follow a pickle of `torch.save` as data: dicts, lists, plain values, places of tensors. Calls nothing."""

import pickletools
from typing import Any, NamedTuple

import torch

from lerobot_lam_diffusion.reading import UnreadableError, shown

MOST_OPCODES = 1 << 18


class TensorInFile(NamedTuple):
    """Where a strided tensor lies: `storage_size` numbers under `key`, and the view of them that it is."""

    dtype: torch.dtype
    key: str
    storage_size: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Other(NamedTuple):
    """Something that `torch.save` writes and tokens are not: a dtype, a sparse tensor, bytes."""

    name: str


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: torch.dtype | None  # None: untyped
    key: str
    size: int


_STORAGES: dict[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32, "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64, "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": None,
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_OTHERS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers (meta)",
    "torch._utils._rebuild_wrapper_subclass": "a subclass of Tensor",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a foreign device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a foreign device",
    "torch._utils._rebuild_parameter_with_state": "a Parameter with attributes",
    "torch._tensor._rebuild_from_type_v2": "a subclass of Tensor, or a Tensor with attributes",
    "torch.serialization._get_layout": "a layout", "torch.device": "a device", "torch.Size": "a torch.Size",
    "_codecs.encode": "bytes", "__builtin__.set": "a set", "__builtin__.complex": "a complex number",
    "collections.Counter": "a Counter", "torch.Tensor": "a type", "torch.nn.parameter.Parameter": "a type",
    "torch.per_tensor_affine": "a scheme", "torch.per_channel_affine": "a scheme",
    "torch.QInt8Storage": "a type", "torch.QUInt8Storage": "a type", "torch.QInt32Storage": "a type",
}  # fmt: skip
_EMPTY_DICT = "collections.OrderedDict"
_NAMES = {*_STORAGES, *_DTYPES, *_OTHERS, _TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER, _EMPTY_DICT}


def read_pickle(content: bytes) -> Any:
    """What a pickle holds, tensors as `TensorInFile`.

    Raises:
        UnreadableError: damaged; or it names anything but tensors and plain values, which could be code.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count >= MOST_OPCODES:
                raise UnreadableError("it holds more values than token files do")
            machine.step(opcode.name, argument)
    except UnreadableError:
        raise
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UnreadableError(f"its pickle is damaged ({shown(str(error))})") from error
    return machine.result()


class _Machine:
    """The pickle machine without its calls: REDUCE only notes what would have been made."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # stacks below each open MARK
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise UnreadableError("its pickle is damaged (it leaves several values)")
        return self.stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _LITERALS:
            stack.append(argument)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode == "EMPTY_LIST":
            stack.append([])
        elif opcode in _TUPLES:
            self._put_tuple(_TUPLES[opcode])
        elif opcode == "TUPLE":
            whole = tuple(self._since_mark())
            self.stack.append(whole)
        elif opcode in ("APPEND", "APPENDS"):
            items = self._since_mark() if opcode == "APPENDS" else [stack.pop()]
            _of_type(self.stack[-1], list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if opcode == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(_of_type(self.stack[-1], dict), items)
        elif opcode == "GLOBAL":
            stack.append(_global(argument))
        elif opcode == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif opcode == "REDUCE":
            arguments = _of_type(stack.pop(), tuple)
            stack.append(_reduced(_of_type(stack.pop(), _Global).name, arguments))
        elif opcode == "BUILD":  # attributes of an OrderedDict, such as a state dict's `_metadata`
            stack.pop()
            _of_type(stack[-1], dict)
        elif opcode not in ("PROTO", "STOP"):
            raise UnreadableError(f"its pickle uses {opcode}, which torch.save does not")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _put_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError("pop from empty stack")
        start = len(self.stack) - size
        self.stack[start:] = [tuple(self.stack[start:])]


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _set_items(document: dict, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # The hash of nested tuples takes exponential time.
        if not isinstance(key, str | int | float):
            raise UnreadableError(f"a dict in it has the key {shown(key)}, expected text or a number")
        document[key] = value


def _global(argument: str) -> _Global:
    name = argument.replace(" ", ".", 1)
    if name not in _NAMES:
        raise UnreadableError(f"it names {shown(name)}, which is neither a plain value nor a tensor")
    return _Global(name)


def _storage(identity: Any) -> _Storage:
    kind, storage, key, location, size = _of_type(identity, tuple)
    name = _of_type(storage, _Global).name
    if kind != "storage" or name not in _STORAGES or not isinstance(location, str) or not _is_size(size):
        # A storage of another dtype, such as of a quantized tensor: its tensor is an `Other`.
        return _Storage(None, "", 0)
    return _Storage(_STORAGES[name], _of_type(key, str), size)


def _reduced(name: str, arguments: tuple) -> Any:
    if name in _OTHERS:
        return Other(_OTHERS[name])
    if name == _EMPTY_DICT and arguments == ():
        return {}
    if name == _PARAMETER and arguments and isinstance(arguments[0], TensorInFile | Other):
        return arguments[0]
    if name not in (_TENSOR, _TENSOR_WITH_DTYPE):
        raise UnreadableError(f"it calls {name}, which torch.save does not")
    storage, offset, shape, stride, *_ = arguments
    storage = _of_type(storage, _Storage)
    dtype = _DTYPES[_of_type(arguments[6], _Global).name] if name == _TENSOR_WITH_DTYPE else storage.dtype
    if dtype is None:
        return Other("a tensor of a storage without dtype")
    numbers = (offset, *_of_type(shape, tuple), *_of_type(stride, tuple))
    if len(shape) != len(stride) or len(shape) > 64 or not all(map(_is_size, numbers)):
        raise ValueError(f"a tensor of shape {shown(shape)}")
    # An untyped storage counts bytes.
    size = storage.size if storage.dtype is not None else storage.size // dtype.itemsize
    return TensorInFile(dtype, storage.key, size, offset, shape, stride)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
