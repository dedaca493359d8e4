"""A NamedTuple of arrays as one pointer: how the state of a machine travels in compiled code.

Numba passes an array as seven words and a tuple of arrays as all of their words, by value, in every call that is
not inlined: fifteen arrays are 840 bytes a call, which costs more than most of our functions do. It also spends
13 us on finding out the types of the arrays when Python calls in. So the arrays' addresses and lengths stand in a
*table*, an int64 array; compiled functions get one pointer to it, and ``mem.folios`` reads the address from there.
The table does not change while compiled code runs, which the compiler is told (``invariant.load``).

What ``mem.folios`` is in compiled code is a *column*: indexing it from 0 on is all that it can do. Numba's arrays take
negative indices as well; asking for each index whether it is one takes 37 ns of the 160 that moving a folio without its
bytes takes. A field that needs a length can be had as an array, and first_rows() makes one of a column for functions that take
arrays.

With the JIT disabled the tuple is its own table.
"""

import operator

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_global, signature
from numba.extending import infer_getattr, intrinsic, lower_builtin, lower_getattr_generic, models, register_model
from numba.np.arrayobj import populate_array

from offload.jit import JIT_DISABLED

__all__ = ("pack", "make_unpack", "first_rows")


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


class ColumnType(types.Type):
    """The type of a pointer to the first of values of ``dtype``, which are indexed by an integer that is not negative."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Column({dtype})")


@register_model(ColumnType)
class _ColumnModel(models.PrimitiveModel):
    def __init__(self, manager, column):
        super().__init__(manager, column, manager.lookup(column.dtype).get_data_type().as_pointer())


@infer_global(operator.getitem)
class _ColumnGet(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], ColumnType) and isinstance(args[1], types.Integer):
            return signature(args[0].dtype, args[0], types.intp)
        return None


@infer_global(operator.setitem)
class _ColumnSet(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], ColumnType) and isinstance(args[1], types.Integer):
            return signature(types.none, args[0], types.intp, args[0].dtype)
        return None


@lower_builtin(operator.getitem, ColumnType, types.Integer)
def _get_value(context, builder, signature, args):
    column, i = args
    return context.unpack_value(builder, signature.args[0].dtype, builder.gep(column, [i]))


@lower_builtin(operator.setitem, ColumnType, types.Integer, types.Any)
def _set_value(context, builder, signature, args):
    column, i, value = args
    context.pack_value(builder, signature.args[0].dtype, value, builder.gep(column, [i]))
    return context.get_dummy_value()


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
def _get_field(context, builder, table_type, table, field):
    word = ir.IntType(64)
    field_type = table_type.fields[field]
    row = 2 * list(table_type.fields).index(field)

    def load(i):
        value = builder.load(builder.gep(table, [word(i)]))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
        return value

    if isinstance(field_type, ColumnType):
        return builder.inttoptr(load(row), context.get_value_type(field_type))
    data = context.get_value_type(ColumnType(field_type.dtype))
    return _make_array(context, builder, field_type, builder.inttoptr(load(row), data), load(row + 1))


def _make_array(context, builder, array_type, data, nr):
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
    array = context.make_array(array_type)(context, builder)
    populate_array(array, data=builder.bitcast(data, array.data.type), shape=cgutils.pack_array(builder, [nr]),
                   strides=cgutils.pack_array(builder, [itemsize]), itemsize=itemsize, meminfo=None)
    return array._getvalue()


def make_unpack(name, dtypes, as_arrays=()):
    """A compiled ``unpack(table)`` that gives compiled code a value with the columns of ``dtypes`` (a NamedTuple).

    Those named in ``as_arrays`` are arrays, with a length.
    """
    if JIT_DISABLED:
        return lambda table: table
    scalars = {field: numba.from_dtype(np.dtype(dtype)) for field, dtype in zip(dtypes._fields, dtypes)}
    table_type = TableType(name, {field: types.Array(scalar, 1, "C") if field in as_arrays else ColumnType(scalar)
                                  for field, scalar in scalars.items()})

    @intrinsic
    def unpack(typingctx, table):
        def codegen(context, builder, signature, args):
            return context.make_array(signature.args[0])(context, builder, args[0]).data
        return table_type(table), codegen

    return unpack


if JIT_DISABLED:
    def first_rows(column, nr):
        return column[:nr]
else:
    @intrinsic
    def first_rows(typingctx, column, nr):
        """The first ``nr`` values of a column as an array (a view)."""
        def codegen(context, builder, signature, args):
            return _make_array(context, builder, signature.return_type, *args)
        return types.Array(column.dtype, 1, "C")(column, types.intp), codegen
