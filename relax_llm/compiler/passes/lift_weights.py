"""What depends on weights alone is computed once, when the artifact is made."""

from dataclasses import dataclass

from tvm import IRModule, relax

from relax_llm.compiler.bindings import Edit, Line, is_op, substitute, transposed, typed, used
from relax_llm.compiler.export import CACHES
from relax_llm.compiler.passes.screen_head import DECODE, ESTIMATES, MARGINS
from relax_llm.compiler.passes.select_kernels import ENCODE, PACK
from relax_llm.compiler.recipes import (
    Concat,
    Decode,
    Encode,
    Estimate,
    Margins,
    Pack,
    Recipe,
    Source,
    Transpose,
    from_json,
    to_json,
    weight_name,
)

WEIGHTS = "relax_llm.weights"
"""Module attribute: the artifact's weights as recipes, in the order of the `weights` argument."""


@dataclass(frozen=True)
class LiftWeights:
    """Replace expressions over weights by parameters, and gather caches and weights into one tuple each.

    Before::

        def decode(token_ids, kv_len, k_cache, v_cache, wq, wk, wv, ...):
            w = R.concat((wq, wk, wv), axis=0)
            packed = R.call_pure_packed("relax_llm.pack.tiled32", w)
            qkv = R.call_tir(matmul_n960_k576, (x, packed))

    After::

        def decode(token_ids, kv_len, caches, weights):
            q_proj+k_proj+v_proj = weights[1]      # tiled32(concat(wq, wk, wv))
            qkv = R.call_tir(matmul_n960_k576, (x, q_proj+k_proj+v_proj))

    A function without caches and weights stays as it is.
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Rewrite every function; the recipes become a module attribute, read back by `weight_recipes`."""
        edit = Edit(mod)
        entries = [line for line in edit.lines if CACHES in (line.attrs or {})]
        recipes: dict[Recipe, relax.Type] = {}
        lifted = [_lift(line, recipes) for line in entries]
        order = {recipe: index for index, recipe in enumerate(recipes)}
        weights_type = relax.TupleType(list(recipes.values()))
        for line, variables in zip(entries, lifted, strict=True):
            _gather(line, variables, order, weights_type)
        return edit.module().with_attr(WEIGHTS, [to_json(recipe) for recipe in recipes])


def weight_recipes(mod: IRModule) -> list[Recipe]:
    """The recipes that `LiftWeights` found, in the order of the `weights` argument."""
    return [from_json(str(text)) for text in mod.attrs[WEIGHTS]]


def _lift(line: Line, recipes: dict[Recipe, relax.Type]) -> dict[relax.Var, Recipe]:
    """Find every weight that a function uses: the variable that holds it, and its recipe."""
    caches = int(line.attrs[CACHES])
    known: dict[relax.Var, Recipe] = {var: Source(var.name) for var in line.params[2 + caches :]}
    types = {var: var.ty for var in known}
    for var, expr in list(line):
        recipe = _recipe(expr, known)
        if recipe is not None:
            known[var], types[var] = recipe, var.ty
            line.drop(var)
    needed = {var for _, expr in line for var in used(expr) if var in known}
    for var in known:
        if var in needed:
            recipes.setdefault(known[var], types[var])
    return {var: known[var] for var in known if var in needed}


def _recipe(expr: relax.Expr, known: dict[relax.Var, Recipe]) -> Recipe | None:
    matrix = transposed(expr)
    if matrix is not None and matrix in known:
        return Transpose(known[matrix])
    if is_op(expr, "relax.concat") and int(expr.attrs.axis) == 0:
        parts = list(expr.args[0])
        return Concat(tuple(known[part] for part in parts)) if all(part in known for part in parts) else None
    if is_op(expr, "relax.call_pure_packed") and expr.args[1] in known:
        symbol = str(expr.args[0].global_symbol)
        for prefix, kind in ((ENCODE, Encode), (PACK, Pack), (ESTIMATES, Estimate), (MARGINS, Margins)):
            if symbol.startswith(prefix):
                return kind(known[expr.args[1]], symbol.removeprefix(prefix))
        if symbol.startswith(DECODE):
            return Decode(known[expr.args[1]], symbol.removeprefix(DECODE), int(expr.ty.shape[1]))
    return None


def _gather(
    line: Line, variables: dict[relax.Var, Recipe], order: dict[Recipe, int], weights_type: relax.TupleType
) -> None:
    caches = line.params[2 : 2 + int(line.attrs[CACHES])]
    cache_tuple = relax.Var("caches", relax.TupleType([var.ty for var in caches]))
    weight_tuple = relax.Var("weights", weights_type)
    substitution: dict[relax.Var, relax.Var] = {}
    loads = []
    for index, var in enumerate(caches):
        substitution[var] = relax.DataflowVar(var.name, var.ty)
        loads.append((substitution[var], typed(relax.TupleGetItem(cache_tuple, index))))
    seen: dict[Recipe, relax.Var] = {}
    for var, recipe in variables.items():
        if recipe not in seen:
            seen[recipe] = relax.DataflowVar(weight_name(recipe), var.ty)
            loads.append((seen[recipe], typed(relax.TupleGetItem(weight_tuple, order[recipe]))))
        substitution[var] = seen[recipe]
    for var, expr in list(line):
        line.rebind(var, substitute(expr, substitution))
    line.insert(None, loads)
    line.params = [*line.params[:2], cache_tuple, weight_tuple]
