"""Functions that kernels call: over pointers and numbers, private to a library, and shared by all kernels of one.

A kernel stays one `PrimFunc`. What it calls is found by `complete`, when functions become a module.
"""

from collections.abc import Callable, Mapping
from functools import cache
from threading import Lock

from tvm import ir, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr

INTERNAL = "relax_llm.internal"
"""Function attribute of what only other functions of the library call; it keeps no symbol there."""

ENTRY = "relax_llm.entry"
"""Function attribute of what a library has for calls from outside, and no model calls."""

_made: dict[tuple[object, ...], ir.GlobalVar] = {}
_functions: dict[ir.GlobalVar, PrimFunc] = {}
_entries: set[ir.GlobalVar] = set()
_making = Lock()


def inner(
    name: str, key: tuple[object, ...], emit: Callable[[], None], *, entry: bool = True
) -> ir.GlobalVar:
    """The function of a name and key, to be called with `builder.call`; made on first use.

    Args:
        name: Its name in the library.
        key: What else it depends on.
        emit: Declares arguments with `pointer` and `number`, and emits the body.
        entry: Let it be called from outside of the library, too, as NAME__entry. Do without only where all its calls
            pass on the last number that another one with an entry was given: see `returning`.
    """
    whole = (name, *key)
    with _making:
        found = _made.get(whole)
    if found is not None:
        return found
    written = b.build(name, {"tirx.is_scheduled": True, "tirx.noalias": True, INTERNAL: True}, emit)
    var = ir.GlobalVar(name)
    func = returning(var, list(written.params), [written.body])
    for attr, value in written.attrs.items():
        if attr != "global_symbol":
            func = func.with_attr(attr, value)
    with _making:
        var = _made.setdefault(whole, var)
        _functions.setdefault(var, func)
        if entry:
            _entries.add(var)
    return var


def returning(var: ir.GlobalVar, params: list[Expr], body: list[Expr]) -> PrimFunc:
    """The function behind a variable, to be called from others: it gives 0, and stays a function.

    LLVM must not copy it into its callers. What they keep in registers would take them from a tile; and TVM tells LLVM
    that buffers of different names never share memory, which holds within a function, but not for the buffers of a
    caller and a callee. LLVM copies no function that calls itself, so this one seems to, where its last number is one
    that no caller gives, and no constant in all calls.
    """
    sizes = [param for param in params if not isinstance(param.ty, ir.PointerType)]
    if sizes:
        never = sizes[-1] == tirx.const(-(2**63), "int64")
        body = [tirx.IfThenElse(never, tirx.Evaluate(ir.Call(var, params)), None), *body]
    last = tirx.Return(tirx.const(0, "int32"))
    return tirx.PrimFunc(params, tirx.SeqStmt([*body, last]), ret_type=ir.PrimType("int32"))


def pointer(name: str, dtype: str = "float32") -> Expr:
    """Declare the next argument of an inner function: an address."""
    return T.arg(name, T.handle(dtype))


def memory(address: Expr, shape: tuple[Expr, ...], dtype: str = "float32") -> Expr:
    """What lies at an address, as a tensor."""
    return T.decl_buffer(shape, dtype, data=address)


def number(name: str) -> Expr:
    """Declare the next argument of an inner function: an int64."""
    return b.scalar(name)


def complete(functions: Mapping[ir.GlobalVar, PrimFunc]) -> dict[ir.GlobalVar, PrimFunc]:
    """Functions and all that they call.

    With them come their entries: without, LLVM concludes that what all callers give is always so, and sees through
    `returning`.
    """
    whole = dict(functions)
    rest = list(functions.values())
    while rest:
        for var in (rest.pop().attrs or {}).get(b.CALLS, ()):
            if var not in whole:
                whole[var] = _functions[var]
                rest.append(_functions[var])
    return whole | dict(_entry(var) for var in whole if var in _entries)


@cache
def _entry(var: ir.GlobalVar) -> tuple[ir.GlobalVar, PrimFunc]:
    """The function, to be called from outside by its name."""
    params = [tirx.Var(param.name, param.ty) for param in _functions[var].params]
    func = tirx.PrimFunc(params, tirx.Evaluate(ir.Call(var, params)))
    for attr in ("tirx.is_scheduled", ENTRY):
        func = func.with_attr(attr, True)
    name = var.name_hint + "__entry"
    return ir.GlobalVar(name), func.with_attr("global_symbol", name)
