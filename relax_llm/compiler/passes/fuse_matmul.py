"""Matrix products take in what follows them, and become launches of a kernel for the whole problem."""

from dataclasses import dataclass, field, replace as changed_copy

from tvm import IRModule, relax
from tvm_ffi import structural_equal

from relax_llm.compiler.bindings import Edit, Line, bind, is_op, is_vector, transposed, typed
from relax_llm.kernels.matmul import Matmul, definition

_ACTIVATIONS = {
    "relax.nn.silu": "silu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.relu": "relu",
}


@dataclass(frozen=True)
class FuseMatmul:
    """Fuse bias, activation, gating and residual into matmuls by weights.

    Before::

        gate = R.nn.silu(R.matmul(x, R.permute_dims(wg)))
        h = R.multiply(gate, R.matmul(x, R.permute_dims(wu)))
        y = R.add(r, R.matmul(h, R.permute_dims(wd)))

    After::

        h = R.call_tir(loops_matmul_n3072_k576_silu_gated, (x, R.concat((wg, wu), axis=0)))
        y = R.call_tir(loops_matmul_n576_k1536_residual, (h, wd, r))

    The functions called are the problems' definitions, plain loops over the weight as [N, K]. Products of two
    activations are left alone.
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Rewrite every function."""
        edit = Edit(mod)
        for line in edit.lines:
            for var in [var for var, expr in line if is_op(expr, "relax.matmul")]:
                _fuse(edit, line, var)
        return edit.module()


@dataclass
class _Group:
    """A product and what has been fused into it: the problem, its operands, and the variable it ends in."""

    problem: Matmul
    end: relax.Var
    x: relax.Expr
    weight: relax.Expr
    bias: relax.Expr | None = None
    residual: relax.Expr | None = None
    new: list[tuple[relax.Var, relax.Expr]] = field(default_factory=list)


def _fuse(edit: Edit, line: Line, start: relax.Var) -> None:
    if start not in line:  # already taken in by another
        return
    group = _product(line, start)
    if group is None:
        return
    while _extend(line, group):
        pass
    function = edit.kernel(f"loops_{group.problem.name}", lambda: definition(group.problem))
    operands = [
        group.x,
        group.weight,
        *(value for value in (group.bias, group.residual) if value is not None),
    ]
    line.insert(group.end, group.new)
    line.rebind(group.end, typed(relax.op.call_tir(function, operands, out_ty=group.end.ty)))


def _product(line: Line, var: relax.Var) -> _Group | None:
    """The product bound to a variable, if its second operand is a matrix of weights."""
    x, right = line[var].args
    if len(x.ty.shape) != 3 or len(right.ty.shape) != 2:
        return None
    if not _is_weight(line, right) or {str(x.ty.dtype), str(right.ty.dtype)} != {"float32"}:
        return None
    new = []
    weight = transposed(line.get(right))
    if weight is None:
        new = [bind("weight", relax.op.permute_dims(right))]
        weight = new[0][0]
    n, k = (int(size) for size in weight.ty.shape)
    return _Group(Matmul(n, k), var, x, weight, new=new)


def _is_weight(line: Line, expr: relax.Expr) -> bool:
    """Whether an expression can be computed when the artifact is made: `LiftWeights` knows the same operators."""
    if any(param.same_as(expr) for param in line.params):
        return True
    definition = line.get(expr)
    matrix = transposed(definition)
    if matrix is not None:
        return _is_weight(line, matrix)
    if definition is None or not is_op(definition, "relax.concat") or int(definition.attrs.axis) != 0:
        return False
    return all(_is_weight(line, part) for part in definition.args[0])


def _extend(line: Line, group: _Group) -> bool:
    """Take in the one operation that uses the group's result; False where there is none that fits."""
    users = line.users(group.end)
    var = users[0] if len(users) == 1 else None
    if var is None:
        return False
    expr, problem = line[var], group.problem
    if not isinstance(expr, relax.Call) or problem.residual:
        return False
    others = [arg for arg in expr.args if isinstance(arg, relax.Expr) and not arg.same_as(group.end)]
    if is_op(expr, "relax.add") and len(others) == 1:
        other = others[0]
        shape = other.ty.shape
        if is_vector(other, problem.n) and not (problem.bias or problem.activation or problem.gated):
            group.bias, group.problem = other, changed_copy(problem, bias=True)
        elif structural_equal(shape, group.end.ty.shape):
            group.residual, group.problem = other, changed_copy(problem, residual=True)
        else:
            return False
    elif expr.op.name in _ACTIVATIONS and not (problem.activation or problem.gated):
        group.problem = changed_copy(problem, activation=_ACTIVATIONS[expr.op.name])
    elif is_op(expr, "relax.multiply") and problem.activation and len(others) == 1 and not problem.gated:
        if not _gate(line, group, others[0]):
            return False
    else:
        return False
    line.drop(group.end)
    group.end = var
    return True


def _gate(line: Line, group: _Group, up: relax.Expr) -> bool:
    """Take in the product that the activated group is multiplied with, where it is one of the same shape."""
    start, last = up, line.get(up)
    if is_op(last, "relax.add"):
        start = last.args[0]
    if not is_op(line.get(start), "relax.matmul") or any(len(line.users(var)) != 1 for var in {up, start}):
        return False
    other = _product(line, start)
    if (
        other is None
        or not other.x.same_as(group.x)
        or other.problem != Matmul(group.problem.n, group.problem.k)
    ):
        return False
    bias = None if up.same_as(start) else line[up].args[1]
    if (bias is None) != (group.bias is None) or (bias is not None and not is_vector(bias, group.problem.n)):
        return False
    for var in dict.fromkeys([up, start]):
        line.drop(var)
    stacked = bind("weight", relax.op.concat([group.weight, other.weight], axis=0))
    group.new += [*other.new, stacked]
    group.weight = stacked[0]
    if bias is not None:
        joined = bind("bias", relax.op.concat([group.bias, bias], axis=0))
        group.new.append(joined)
        group.bias = joined[0]
    group.problem = changed_copy(group.problem, n=2 * group.problem.n, gated=True)
    return True
