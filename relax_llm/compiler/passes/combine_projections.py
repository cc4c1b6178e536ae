"""Linear layers over one input whose results are joined become one linear layer."""

from dataclasses import dataclass

from tvm import IRModule, relax

from relax_llm.compiler.bindings import Edit, Line, bind, is_op, is_vector, transposed, typed


@dataclass(frozen=True)
class CombineProjections:
    """Turn a concatenation of products into a product with concatenated weights.

    Before::

        q = R.matmul(x, R.permute_dims(wq))
        k = R.matmul(x, R.permute_dims(wk))
        v = R.matmul(x, R.permute_dims(wv))
        qkv = R.concat((q, k, v), axis=-1)

    After::

        w = R.concat((wq, wk, wv), axis=0)
        qkv = R.matmul(x, R.permute_dims(w))

    Biases are joined likewise where every part has one. Nothing changes where a part is used elsewhere, too.
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Rewrite every function."""
        edit = Edit(mod)
        for line in edit.lines:
            for var in [var for var, expr in line if is_op(expr, "relax.concat")]:
                _combine(line, var)
        return edit.module()


def _combine(line: Line, target: relax.Var) -> None:
    concat = line[target]
    if int(concat.attrs.axis) not in (-1, len(target.ty.shape) - 1):
        return
    inputs, weights, biases = set(), [], []
    product: relax.Expr
    for part in concat.args[0]:
        if len(line.users(part)) != 1:
            return
        product, bias = line.get(part), None
        if is_op(product, "relax.add"):
            product, bias = line.get(product.args[0]), product.args[1]
        weight = transposed(line.get(product.args[1])) if is_op(product, "relax.matmul") else None
        if weight is None or (bias is not None and not is_vector(bias, int(weight.ty.shape[0]))):
            return
        inputs.add(product.args[0])
        weights.append(weight)
        biases.append(bias)
    if len(inputs) != 1 or (None in biases and set(biases) != {None}):
        return
    weight = bind("weight", relax.op.concat(weights, axis=0))
    matrix = bind("transposed", relax.op.permute_dims(weight[0]))
    new = [weight, matrix]
    product = relax.op.matmul(inputs.pop(), matrix[0])
    if biases[0] is not None:
        new += [bind("product", product), bind("bias", relax.op.concat(biases, axis=0))]
        product = relax.op.add(new[-2][0], new[-1][0])
    line.insert(target, new)
    line.rebind(target, typed(product))
