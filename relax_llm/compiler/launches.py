"""Reading a module's launches: which kernel runs where, on what, at what cost."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tvm import IRModule, ir, relax
from tvm.tirx import PrimFunc

from relax_llm.artifact.manifest import Argument, Dispatcher, Kernel, Launch, Served
from relax_llm.compiler.bindings import Line, is_op, lines
from relax_llm.compiler.passes.lift_weights import weight_recipes
from relax_llm.compiler.planner import Choice
from relax_llm.compiler.recipes import Recipe, weight_name
from relax_llm.kernels.lookup import LastToken
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.problem import Problem, problem_of
from relax_llm.layers.decoder import site_of_last_token, site_of_weight


def functions(mod: IRModule) -> dict[str, tuple[Launch, ...]]:
    """The launches of every function of a module after `LiftWeights`, in program order."""
    recipes = weight_recipes(mod)
    problems = {
        var.name_hint: problem
        for var, func in mod.functions_items()
        if isinstance(func, PrimFunc) and (problem := problem_of(func))
    }
    return {line.name: tuple(_launches(line, recipes, problems)) for line in lines(mod)}


def kernels(mod: IRModule, calls: Mapping[str, tuple[Launch, ...]]) -> dict[str, Kernel]:
    """Every kernel that the functions launch, by symbol."""
    examples = {launch.kernel: launch for launches in calls.values() for launch in launches}
    found = {}
    for var, func in mod.functions_items():
        if isinstance(func, PrimFunc) and var.name_hint in examples:
            problem = problem_of(func)
            if problem is None:
                found[var.name_hint] = _unnamed(examples[var.name_hint])
            else:
                fields = json.loads(problem.to_json())
                operator = fields.pop("operator")
                found[var.name_hint] = Kernel(operator, fields, problem.flops, problem.bytes)
    return found


def dispatchers(choices: Mapping[str, tuple[Problem, Choice]]) -> dict[str, Dispatcher]:
    """What each function that chooses among several kernels can run."""
    found = {}
    for symbol, (problem, choice) in choices.items():
        if not choice.realized:
            continue
        records = [realized.kernel for realized in choice.realized.values()]
        general = [record.name for record in records if record.sizes.everything]
        found[symbol] = Dispatcher(
            operator_of(problem).axes,
            tuple(Served(record.name, record.sizes.to_json()) for record in records),
            tuple(Served(part.kernel, part.sizes.to_json()) for part in choice.ranges),
            general[0] if general else "",
        )
    return found


def _unnamed(launch: Launch) -> Kernel:
    """A kernel without a problem: one operation for each element of the output, every argument moved once."""
    sizes = ["*".join(argument.shape) or "1" for argument in launch.arguments if argument.role != "size"]
    return Kernel("fused", {}, sizes[-1], " + ".join(f"4*{size}" for size in sizes))


def _launches(line: Line, recipes: list[Recipe], problems: Mapping[str, Problem]) -> list[Launch]:
    tuples = line.params[2:4]  # of caches and of weights, in functions that have these
    roles: dict[relax.Var, tuple[str, str]] = {}
    sites: dict[relax.Var, str] = {}  # where a tensor is made
    found = []
    for var, expr in line:
        if isinstance(expr, relax.TupleGetItem):
            sites[var] = sites.get(expr.tuple_value, "")
            if expr.tuple_value.same_as(tuples[1]):
                roles[var] = ("weight", weight_name(recipes[expr.index]))
            elif expr.tuple_value.same_as(tuples[0]):
                roles[var] = ("cache", var.name)
        elif is_op(expr, "relax.call_tir") or is_op(expr, "relax.call_tir_inplace"):
            found.append(_launch(expr, roles, sites, problems))
            sites[var] = found[-1].site
    return found


def _launch(
    call: relax.Call,
    roles: Mapping[relax.Var, tuple[str, str]],
    sites: Mapping[relax.Var, str],
    problems: Mapping[str, Problem],
) -> Launch:
    arguments = []
    for operand in call.args[1]:
        if isinstance(operand.ty, relax.TensorType):
            role, name = roles.get(operand, ("activation", ""))
            arguments.append(_tensor(role, name, operand.ty))
        else:
            arguments.append(Argument("size", str(operand), (), "int64"))
    outputs = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    if is_op(call, "relax.call_tir_inplace"):
        outputs = [
            out for out, index in zip(outputs, call.attrs.inplace_indices, strict=True) if int(index) < 0
        ]
    arguments += [_tensor("output", "", out) for out in outputs]
    kernel: ir.GlobalVar = call.args[0]
    problem = problems.get(kernel.name_hint)
    named = [argument for argument in arguments if argument.name and argument.role in ("weight", "cache")]
    if named:
        site = site_of_weight(named[0].name)
    elif isinstance(problem, LastToken):
        site = site_of_last_token(sites.get(call.args[1][0], "")) or problem.name
    else:  # a place of its own
        site = problem.name if problem else kernel.name_hint
    return Launch(site, kernel.name_hint, tuple(arguments))


def _tensor(role: str, name: str, type_: Any) -> Argument:
    return Argument(role, name, tuple(_size(size) for size in type_.shape), str(type_.dtype))


def _size(size: Any) -> str:
    """A size as plain arithmetic; TVM prints the constants in it as T.int64(3)."""
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(size))
