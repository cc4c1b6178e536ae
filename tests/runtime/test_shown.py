"""Kernels, launches and steps of a model in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relax_llm.artifact.kernel_list import kernel_uses
from tests.tracing.notebook import Reader

if TYPE_CHECKING:
    import relax_llm as rl


def test_kernels(model: rl.Runner) -> None:
    kernels = model.artifact.kernels
    assert kernels == kernel_uses(model.artifact.manifest)
    assert {use.name for use in kernels} == model.artifact.manifest.kernels.keys()
    html = Reader(kernels._repr_html_())
    assert html.tags.count("tr") == 1 + len(kernels)
    assert tuple(html.cells[6:12]) == tuple(kernels.table.rows[0])
    assert repr(kernels) == str(kernels) == str(kernels.table)


def test_a_launch_and_steps(model: rl.Runner) -> None:
    with model.steps("decode", model.start(), 3) as steps:
        launch = next(steps)
        html = Reader(launch._repr_html_())
        assert str(launch) in html.outside
        assert {operand.role for operand in launch.arguments} <= set(html.cells)
        assert launch.why in html.text
        assert "not yet" in html.cells
        launch.run()
        assert "run" in Reader(launch._repr_html_()).cells
        listed = Reader(steps._repr_html_())
        assert listed.tags.count("tr") == 1 + len(steps)
        assert launch.site in listed.cells


def test_a_launch_costs_by_the_rows_it_has(model: rl.Runner) -> None:
    """The last matmul of a prefill is given one row, whatever the length of the prompt."""
    kernels = model.artifact.manifest.kernels
    for launch in model.steps("prefill", model.start(), list(range(17))):
        if launch.operator == "matmul":
            problem = kernels[launch.symbol].problem
            least = 2 * launch.sizes["M"] * problem["n"] * problem["k"]
            assert least <= launch.flops <= 1.1 * least
