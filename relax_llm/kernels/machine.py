"""The processor a kernel is generated for: a TVM target, reduced to what tile sizes depend on."""

from dataclasses import dataclass, field

from tvm.target import Target

from relax_llm import cpu
from relax_llm.errors import CompileError

# Extensions worth using on top of a level: /proc/cpuinfo's name and LLVM's.
_EXTENSIONS = {"avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "avx_vnni": "avxvnni"}

CODE_GENERATION = {"tirx.disable_storage_rewrite": True}
"""TVM's options for code generation: its storage rewriting forgets which buffers belong on the stack (see
`kernels.builder.local`)."""

LANES = 16
"""f32 lanes of every vector in the kernels; LLVM splits them where registers are narrower."""

LINE = 64
"""Bytes of a cache line, for what is asked for ahead of its use and for memory of a task's own."""

_SOON = 6  # instructions that compute, between two lines, at most, for a core's own prefetcher to be in time

CUDA = "cuda"
_GPU = {
    "arch": "sm_80",
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}
"""What kernels may count on: an architecture whose code later ones compile too, and its limits."""


@dataclass(frozen=True)
class Machine:
    """A processor as code generation sees it.

    Attributes:
        name: An x86-64 level ("x86-64-v3"), an LLVM triple's architecture ("aarch64"), or "cuda".
        features: What the generated code may use, in the spelling of /proc/cpuinfo; an artifact records it.
        vector_bits: Width of a vector register.
        vector_registers: How many there are; 0 for a GPU, whose threads have scalars.
        options: Target options.
    """

    name: str
    features: frozenset[str]
    vector_bits: int
    vector_registers: int
    options: dict[str, object] = field(hash=False, compare=False)

    @property
    def target(self) -> Target:
        """The TVM target that generates code for this machine."""
        return Target(dict(self.options))

    @property
    def architecture(self) -> str:
        """The instruction set family, as `relax_llm.cpu.architecture` spells it."""
        return "x86_64" if self.name in cpu.X86_LEVELS else self.name

    @property
    def streams_into(self) -> int:
        """The level of the cache for lines that are asked for ahead of a loop which reads memory.

        Cores with `avx_vnni` are younger than those that have its instructions for 512 bits alone: their first-level
        caches are larger, and have more misses in flight. See docs/performance.md.
        """
        return 1 if "avx_vnni" in self.features else 2

    def reads_ahead(self, instructions: int, lines: float) -> bool:
        """Whether a core reads ahead by itself in a loop, and needs no more than a line in some to go by.

        Its prefetcher can have more lines on their way than the first-level cache has places for, which is where all
        wait that are asked for one by one. But it is some lines ahead only, and late where much is computed with each.

        Args:
            instructions: That a core computes with, one after the other.
            lines: That it reads meanwhile.
        """
        return self.streams_into > 1 and instructions <= _SOON * lines

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are divided among the threads of a GPU, and launched by a host."""
        return self.name == CUDA

    @property
    def c_flags(self) -> list[str]:
        """What tells a C compiler to use the same instructions."""
        flags = self.options.get("mattr")
        extra = [flag[1:] for flag in flags if flag.startswith("+avx")] if isinstance(flags, list) else []
        if self.name in cpu.X86_LEVELS:
            return [f"-march={self.name}", *(f"-m{flag}" for flag in extra)]
        return []

    @property
    def accumulators(self) -> int:
        """How many vectors of `LANES` f32 a micro-kernel can keep in registers beside its operands."""
        held = self.vector_registers * self.vector_bits // (32 * LANES)
        return max(1, held * 7 // 8)


def machine(name: str | None = None) -> Machine:
    """The machine with this name; without one, the processor that this process runs on.

    Args:
        name: "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4" (with what this host adds to it where it is the
            host's own level), "aarch64", "cuda" (an NVIDIA GPU, with this processor's family as its host), or None.

    Raises:
        CompileError: The name is not known.
    """
    host = cpu.x86_level() if cpu.architecture() == "x86_64" else cpu.architecture()
    wanted = name or host
    if wanted in cpu.X86_LEVELS:
        extras = {} if name else {key: llvm for key, llvm in _EXTENSIONS.items() if key in cpu.features()}
        if "avx512f" not in cpu.X86_LEVELS[wanted]:
            extras = {key: llvm for key, llvm in extras.items() if not key.startswith("avx512")}
        # LLVM would have every second vpdpwssd as two instructions, which wait less for each other.
        tuning = ["+fast-dpwssd"] if "avx512_vnni" in extras else []
        bits, registers = {"x86-64-v4": (512, 32), "x86-64-v3": (256, 16)}.get(wanted, (128, 16))
        options: dict[str, object] = {
            "kind": "llvm",
            "mtriple": "x86_64-linux-gnu",
            "mcpu": wanted,
            "mattr": ["-prefer-256-bit", *(f"+{llvm}" for llvm in extras.values()), *tuning],
        }
        return Machine(wanted, cpu.X86_LEVELS[wanted] | frozenset(extras), bits, registers, options)
    if wanted == "aarch64":
        options = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
        return Machine(wanted, frozenset({"asimd"}), 128, 32, options)
    if wanted == CUDA:
        kind = {"kind": "llvm", "mtriple": f"{cpu.architecture()}-linux-gnu"}
        return Machine(wanted, frozenset(), 32, 0, {"kind": "cuda", **_GPU, "host": kind})
    known = ", ".join([*cpu.X86_LEVELS, "aarch64", CUDA])
    raise CompileError(f"The target {wanted!r} is not known. Known targets: {known}.")
