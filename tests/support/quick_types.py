"""Short cuts for the types and operators of Triton's interpreter; all else goes the original way.

For every sum of two tiles the interpreter builds the tuples of their shapes and the types of the
operands and of the result, and promotes, casts and broadcasts what already agrees. Most of the time
of a kernel goes there. Here shapes and constants are remembered, and operands that agree are passed
on.
"""

from collections.abc import Callable
from typing import Any

from triton import language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

WHOLE = (tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64)
HALVES = (tl.float16, tl.bfloat16)
# These dtypes exist once: as keys their ids are quicker than their names.
WHOLE_IDS = frozenset(map(id, WHOLE))
LIMITS = {id(x): (x.get_int_min_value(), x.get_int_max_value()) for x in WHOLE}
FLOATING_IDS = frozenset(map(id, (tl.float32, tl.float64, *HALVES)))
HALF_IDS = frozenset(map(id, HALVES))
PLAIN_IDS = WHOLE_IDS | FLOATING_IDS | {id(tl.int1)}
BYTES = {id(x): max(x.primitive_bitwidth // 8, 1) for x in (tl.int1, *WHOLE, *HALVES)}
BYTES |= {id(tl.float32): 4, id(tl.float64): 8}
Make = Callable[[Any], Any]


def unwrap(original: Make) -> Make:
    """`_unwrap_if_constexpr`, which most values pass unchanged."""

    def unwrapped(x: Any) -> Any:
        kind = type(x)
        if kind is core.tensor or kind is int or kind is core.dtype:
            return x
        return x.value if kind is core.constexpr else original(x)

    return unwrapped


def tensor_init(original: Callable[..., None]) -> Callable[..., None]:
    """Make a tensor; what follows from its type is kept with the type."""

    def init(self: Any, handle: Any, type: Any) -> None:
        found = type.__dict__.get("_of_tensors")
        if found is None:
            original(self, handle, type)
            type._of_tensors = self.shape, self.numel, self.dtype
            return
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = found

    return init


def block_init(original: Callable[..., None]) -> Callable[..., None]:
    """Make the type of a block; shapes that were valid once are not checked again."""
    valid: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if type(shape) is core.tuple else shape
        key = tuple([x.value if type(x) is core.constexpr else x for x in values])
        found = valid.get(key)
        if found is None:
            original(self, element_ty, shape)
            valid[key] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = found
        self.name = f"<{text}, {element_ty}>"

    return init


def with_element_ty(original: Callable[..., Any]) -> Callable[..., Any]:
    """The type of a block of the same shape, which is remembered for the dtypes that exist once."""
    made: dict[tuple[tuple[int, ...], int], Any] = {}

    def with_element(self: Any, scalar_ty: Any) -> Any:
        if id(scalar_ty) not in PLAIN_IDS:
            return original(self, scalar_ty)
        key = (tuple(self.shape.values), id(scalar_ty))
        if key not in made:
            made[key] = original(self, scalar_ty)
        return made[key]

    return with_element


def _keeps_dtype(value: Any, dtype: Any, div_or_mod: bool) -> bool:
    """Whether a tensor of this dtype and the number are computed in the dtype."""
    kind, which = type(value), id(dtype)
    if which in WHOLE_IDS:
        lowest, highest = LIMITS[which]
        return kind is int and lowest <= value <= highest
    if which in FLOATING_IDS:
        return kind in (int, float) and not (div_or_mod and which in HALF_IDS)
    return False


def _same_shape(a: Any, b: Any) -> bool:
    """Whether two types have one shape, as far as that can be told at once."""
    if a.is_block() and b.is_block():
        return a.shape is b.shape
    return a.is_block() == b.is_block()


def operands(original: Callable[..., Any]) -> Callable[..., Any]:
    """`binary_op_type_checking_impl` for operands that agree, or a tensor and a number."""
    constants: dict[tuple[Any, ...], Any] = {}

    def constant(self: Any, value: Any, like: Any) -> Any:
        shape = tuple(like.shape.values) if like.is_block() else ()
        key = (type(value), value, id(like.scalar), shape)
        if key not in constants:
            if len(constants) > 1000:  # not for ever more values
                constants.clear()
            made = self.scalar_constant(value, like.scalar)
            constants[key] = self.splat(made, like.shape) if shape else made
        known = constants[key]
        # A handle of its own: `>>` changes that of its operand.
        return core.tensor(
            interpreter.TensorHandle(known.handle.data, known.handle.dtype), known.type
        )

    def checked(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        tensors = type(lhs) is core.tensor, type(rhs) is core.tensor
        if all(tensors):
            which = id(lhs.dtype)
            if (
                lhs.dtype is rhs.dtype
                and which in PLAIN_IDS
                and not (div_or_mod and which in HALF_IDS)
                and _same_shape(lhs.type, rhs.type)
            ):
                return lhs, rhs
        elif any(tensors) and arithmetic_check:
            tensor, value = (lhs, rhs) if tensors[0] else (rhs, lhs)
            if _keeps_dtype(value, tensor.dtype, div_or_mod):
                other = constant(self, value, tensor.type)
                return (tensor, other) if tensors[0] else (other, tensor)
        return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return checked


def overflow(original: Callable[..., None]) -> Callable[..., None]:
    """`binary_op_sanitize_overflow_impl`, whose result is looked at only in the debug mode."""

    def sanitized(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
        if self.builder.options.debug:
            original(self, lhs, rhs, binary_op)

    return sanitized


def patch_attr(original: Callable[..., None]) -> Callable[..., None]:
    """`_patch_attr` with a function that passes its arguments on without a copy of their names."""
    semantic = interpreter.interpreter_semantic

    def patch(thing: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        def called(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return member(*arguments, **named)

        scope.set_attr(thing, name, called)

    return patch


def fits(original: Callable[..., bool]) -> Callable[..., bool]:
    """`_validate_np_data_size` from a table."""

    def valid(array: Any, dtype: Any) -> bool:
        size = BYTES.get(id(dtype))
        return original(array, dtype) if size is None else array.itemsize <= size

    return valid


def cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """`cast`, which most often has nothing to do."""

    def casted(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        if input.dtype is dst_ty:
            return input
        return original(self, input, dst_ty, fp_downcast_rounding)

    return casted


def broadcast(original: Callable[..., Any]) -> Callable[..., Any]:
    """`broadcast_impl_value`, which most often has nothing to do."""

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if _same_shape(lhs.type, rhs.type) else original(self, lhs, rhs)

    return broadcasted


# (what has it, its name): what makes the short cut of the original
SHORT_CUTS: dict[tuple[Any, str], Callable[[Any], Any]] = {
    (core, "_unwrap_if_constexpr"): unwrap,
    (core.tensor, "__init__"): tensor_init,
    (core.block_type, "__init__"): block_init,
    (core.block_type, "with_element_ty"): with_element_ty,
    (TritonSemantic, "binary_op_type_checking_impl"): operands,
    (TritonSemantic, "binary_op_sanitize_overflow_impl"): overflow,
    (TritonSemantic, "cast"): cast,
    (TritonSemantic, "broadcast_impl_value"): broadcast,
    (interpreter, "_validate_np_data_size"): fits,
    (interpreter, "_patch_attr"): patch_attr,
}
