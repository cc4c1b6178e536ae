"""A launch as tables, for notebooks."""

from typing import TYPE_CHECKING

from relax_llm.table import Table, html

if TYPE_CHECKING:
    from relax_llm.runtime.launch import Launch


def launch_html(launch: "Launch") -> str:
    """What a launch is, and what it is called with."""
    return html(str(launch), [_facts(launch), _operands(launch)])


def _facts(launch: "Launch") -> Table:
    sizes = ", ".join(f"{name} = {size}" for name, size in launch.sizes.items())
    rows = [
        ("site", launch.site),
        ("operator", launch.operator),
        ("kernel", f"{launch.kernel}: {launch.why}"),
        ("calls", launch.symbol),
        ("sizes", sizes),
        ("flops", f"{launch.flops:,.0f}"),
        ("bytes", f"{launch.bytes:,.0f}"),
        ("done", launch.done or "not yet"),
    ]
    return Table(("launch", f"{launch.function}[{launch.index}]"), rows)


def _operands(launch: "Launch") -> Table:
    rows = [
        (
            operand.role,
            operand.name,
            str(operand.value) if operand.role == "size" else str(list(operand.value.shape)),
            "int64" if operand.role == "size" else str(operand.value.dtype),
        )
        for operand in launch.arguments
    ]
    return Table(("role", "name", "value or shape", "type"), rows)
