"""What no kernel serves still gets a schedule: parallel over cores with vectors along the last axis, or GPU threads."""

from dataclasses import dataclass

from tvm import IRModule, s_tir
from tvm.tirx import PrimFunc

from relax_llm.kernels.gpu import scheduled
from relax_llm.kernels.machine import LANES, Machine

SCHEDULED = "tirx.is_scheduled"


@dataclass(frozen=True)
class ScheduleRest:
    """Schedule every function that is still plain loops.

    Before::

        for i, j, k in T.grid(batch, seq, 48):
            y[i, j, k] = a[i, j, k] + b[0, j, k]

    After::

        for i_j_fused in T.parallel(batch * seq):
            for k_0 in range(3):
                for k_1 in T.vectorized(16):
                    y[...] = a[...] + b[...]

    For a GPU its threads take the elements instead.

    Attributes:
        machine: What to schedule for.
    """

    machine: Machine

    def __call__(self, mod: IRModule) -> IRModule:
        """Schedule in place of the functions."""
        changed = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, PrimFunc) and SCHEDULED not in (func.attrs or {}):
                gpu = self.machine.is_gpu
                changed[var] = scheduled(func, self.machine) if gpu else _schedule(func)
        return changed


def _schedule(func: PrimFunc) -> PrimFunc:
    schedule = s_tir.Schedule(func)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        loops = schedule.get_loops(block)
        kinds = [str(var.iter_type) for var in schedule.get(block).iter_vars]
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "0"]
        if not spatial or (len(spatial) < len(loops) and loops[: len(spatial)] != spatial):
            continue
        last = spatial[-1]
        extent = _constant(schedule.get(last).extent)
        if len(spatial) == len(loops) and extent is not None and extent >= LANES:
            *_, inner = schedule.split(last, [None, LANES])
            schedule.vectorize(inner)
        outer = spatial[:-1] or spatial
        if len(spatial) > 1 or len(spatial) < len(loops):
            schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
    return schedule.mod["main"].with_attr(SCHEDULED, True)


def _constant(extent: object) -> int | None:
    value = getattr(extent, "value", None)
    return int(value) if value is not None else None
