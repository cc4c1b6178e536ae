"""A function with a branch, in instructions of the virtual machine."""

# ruff: noqa: N805
# mypy: ignore-errors
# TVMScript has the form of Python, and a meaning of its own.

from __future__ import annotations

from tvm.script import ir as I, relax as R


@I.ir_module
class Conditional:
    """Allocates the same tensor in a branch, and twice behind it."""

    @R.function
    def main(x: R.Tensor((), "bool"), y: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        R.func_attr({"relax.force_pure": True})
        storage = R.vm.alloc_storage(R.shape([16]), 0, R.dtype("uint8"), R.str("global"))
        if x:
            one = R.vm.alloc_tensor(storage, 0, R.shape([4]), R.dtype("float32"), 0)
            result = one
        else:
            result = y
        two = R.vm.alloc_tensor(storage, 0, R.shape([4]), R.dtype("float32"), 0)
        three = R.vm.alloc_tensor(storage, 0, R.shape([4]), R.dtype("float32"), 0)
        both = (result, two, three)
        return both[0]
