"""A NamedTuple of arrays as one pointer: how the state of a machine travels in compiled code.

Numba passes an array as seven words and a tuple of arrays as all of their words, by value, in every call that is
not inlined: fifteen arrays are 840 bytes a call, which costs more than most of our functions do. It also spends
13 us on finding out the types of the arrays when Python calls in. So the arrays' addresses and lengths stand in a
*table*, an int64 array; compiled functions get one pointer to it, and ``mem.folios`` reads the address from there.
The table does not change while compiled code runs, which the compiler is told (``invariant.load``).

With the JIT disabled the tuple is its own table.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model
from numba.np.arrayobj import populate_array

from offload.jit import JIT_DISABLED

__all__ = ("pack", "make_unpack")


def pack(arrays):
    """The table of a NamedTuple of one-dimensional C-contiguous arrays. The caller keeps the arrays alive."""
    if JIT_DISABLED:
        return arrays
    table = np.empty(2 * len(arrays), np.int64)
    for i, array in enumerate(arrays):
        if not array.flags.c_contiguous or array.ndim != 1:
            raise AssertionError(f"{type(arrays).__name__}.{arrays._fields[i]} is not one-dimensional and contiguous")
        table[2 * i] = array.ctypes.data
        table[2 * i + 1] = len(array)
    return table


class TableType(types.Type):
    """The type of a pointer to a table; ``fields`` are the arrays' names with their types, in order."""

    def __init__(self, name, fields):
        self.fields = fields
        super().__init__(name=f"Table({name}: {', '.join(f'{field}={array}' for field, array in fields.items())})")


@register_model(TableType)
class _TableModel(models.PrimitiveModel):
    def __init__(self, manager, table_type):
        super().__init__(manager, table_type, ir.IntType(64).as_pointer())


@infer_getattr
class _TableAttributes(AttributeTemplate):
    key = TableType

    def generic_resolve(self, table_type, field):
        return table_type.fields.get(field)


@lower_getattr_generic(TableType)
def _get_array(context, builder, table_type, table, field):
    word = ir.IntType(64)
    array_type = table_type.fields[field]
    row = 2 * list(table_type.fields).index(field)

    def load(i):
        value = builder.load(builder.gep(table, [word(i)]))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
        return value

    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
    array = context.make_array(array_type)(context, builder)
    populate_array(array, data=builder.inttoptr(load(row), array.data.type),
                   shape=cgutils.pack_array(builder, [load(row + 1)]),
                   strides=cgutils.pack_array(builder, [itemsize]), itemsize=itemsize, meminfo=None)
    return array._getvalue()


def make_unpack(name, dtypes):
    """A compiled ``unpack(table)`` that gives compiled code a value with the arrays of ``dtypes`` (a NamedTuple)."""
    if JIT_DISABLED:
        return lambda table: table
    table_type = TableType(name, {field: types.Array(numba.from_dtype(np.dtype(dtype)), 1, "C")
                                  for field, dtype in zip(dtypes._fields, dtypes)})

    @intrinsic
    def unpack(typingctx, table):
        def codegen(context, builder, signature, args):
            return context.make_array(signature.args[0])(context, builder, args[0]).data
        return table_type(table), codegen

    return unpack
