"""Which launch reads what another wrote, followed through the registers of a program."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.manifest import Launch
from relax_llm.errors import ArtifactError, InputError
from relax_llm.runtime.program import VOID, Call, Program, Return, Source
from relax_llm.runtime.vm import VirtualMachine

_LAYER = re.compile(r"((?:[^.]+\.)*?\d+)\.")
_WRITES_CACHE = "append"  # the operator whose kernels write into the caches that they are given
_SAME = ("vm.builtin.reshape", "vm.builtin.copy", "vm.builtin.ensure_zero_offset", "vm.builtin.to_device")
_TUPLE, _ITEM = "vm.builtin.make_tuple", "vm.builtin.tuple_getitem"


@dataclass(frozen=True)
class Node:
    """One launch.

    Attributes:
        index: Its place among the function's launches, from 0.
        group: The layer that it belongs to: "layers.3"; empty where it belongs to none.
        launch: What the manifest says of it.
        operator: What is computed.
    """

    index: int
    group: str
    launch: Launch
    operator: str


@dataclass(frozen=True)
class Edge:
    """One tensor that a launch takes.

    Attributes:
        source: Index of the launch that wrote it; None where it comes from the caller of the function.
        target: Index of the launch that takes it; None where it is what the function returns.
        kind: "activation", or "cache", which is written in place.
        name: What the manifest or the function calls it; mostly empty.
        shape: Sizes as text.
        dtype: NumPy's name of the element type.
    """

    source: int | None
    target: int | None
    kind: Literal["activation", "cache"]
    name: str
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """A function as its launches and the tensors between them.

    Attributes:
        function: Its name.
        nodes: Its launches, in program order.
        edges: What they take, in the order of the launches that take it.
    """

    function: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    @property
    def parts(self) -> list[tuple[str, list[Node]]]:
        """Layers, and launches outside of any, in an order in which every tensor goes downwards.

        A launch outside of any layer is a part with the name "". Where layers depend on each other in a circle, the
        order is that of the program.
        """
        parts: list[tuple[str, list[Node]]] = []
        place: dict[int, int] = {}
        layers: dict[str, int] = {}
        for node in self.nodes:
            where = layers.setdefault(node.group, len(parts)) if node.group else len(parts)
            if where == len(parts):
                parts.append((node.group, []))
            parts[where][1].append(node)
            place[node.index] = where
        needs: dict[int, set[int]] = {where: set() for where in range(len(parts))}
        for edge in self.edges:
            if edge.source is not None and edge.target is not None:
                needs[place[edge.target]].add(place[edge.source])
        ordered: list[int] = []
        waiting = dict.fromkeys(needs)
        while waiting:
            ready = (where for where in waiting if needs[where] - {where} <= set(ordered))
            where = next(ready, next(iter(waiting)))
            ordered.append(where)
            del waiting[where]
        return [parts[where] for where in ordered]


def graph_of(artifact: Artifact, function: str) -> Graph:
    """The graph of an artifact's function.

    Raises:
        InputError: There is no such function.
        ArtifactError: The library cannot be loaded here, or is of another version.
    """
    if function not in artifact.manifest.functions:
        raise InputError(
            f"There is no function {function!r}; the functions are {', '.join(artifact.manifest.functions)}."
        )
    artifact.check_machine()
    return graph(artifact, VirtualMachine(artifact.library).program, function)


def graph(artifact: Artifact, program: Program, function: str) -> Graph:
    """The graph of a function, given the program that the artifact's library executes.

    Raises:
        ArtifactError: The program makes other launches than the manifest says.
    """
    manifest = artifact.manifest
    launches = manifest.functions[function]
    nodes = tuple(
        Node(index, _layer(launch.site), launch, manifest.kernels[launch.kernel].operator)
        for index, launch in enumerate(launches)
    )
    registers = _Registers(program, function)
    edges: list[Edge] = []
    made = iter(nodes)
    for call, symbol in registers.calls(manifest.kernels):
        node = next(made, None)
        if node is None or node.launch.kernel != symbol or len(node.launch.arguments) != len(call.arguments):
            raise ArtifactError(
                f"The library launches other kernels in {function} than the manifest says; compile the artifact again."
            )
        edges += registers.launched(node, call)
    if next(made, None) is not None:
        raise ArtifactError(
            f"The library makes fewer launches in {function} than the manifest says; compile it again."
        )
    source = registers.result
    if source is not None:
        output = next(one for one in launches[source].arguments if one.role == "output")
        edges.append(Edge(source, None, "activation", "", output.shape, output.dtype))
    return Graph(function, nodes, tuple(edges))


def _layer(site: str) -> str:
    found = _LAYER.match(site)
    return found[1] if found else ""


@dataclass
class _Registers:
    """Who wrote what the registers of a function hold, while its instructions are gone through.

    Attributes:
        writers: The launch that wrote a register's tensor; registers that no launch wrote are not there.
        tuples: The registers that a register's tuple was made of.
        result: The launch whose tensor the function returns.
    """

    program: Program
    function: str
    writers: dict[int, int] = field(default_factory=dict)
    tuples: dict[int, list[int]] = field(default_factory=dict)
    result: int | None = None

    def calls(self, kernels: Mapping[str, object]) -> Iterator[tuple[Call, str]]:
        """The calls of kernels, one after the other; what is called between them is followed."""
        function = self.program.function(self.function)
        for instruction in self.program.instructions[function.start : function.end]:
            if isinstance(instruction, Return):
                self.result = self.writers.get(instruction.register)
            if not isinstance(instruction, Call):
                continue
            name = self.program.functions[instruction.function].name
            if name in kernels:
                yield instruction, name
            else:
                self._follow(instruction, name)

    def launched(self, node: Node, call: Call) -> Iterator[Edge]:
        """What a launch takes; from now on it is who wrote its outputs."""
        for said, given in zip(node.launch.arguments, call.arguments, strict=True):
            if given.source is not Source.REGISTER:
                continue
            if said.role == "output":
                self.writers[given.value] = node.index
            elif said.role == "activation":
                source = self.writers.get(given.value)
                name = said.name if source is not None else self._parameter(given.value)
                yield Edge(source, node.index, "activation", name, said.shape, said.dtype)
            elif said.role == "cache":
                source = self.writers.get(given.value)
                if source is not None:
                    yield Edge(source, node.index, "cache", said.name, said.shape, said.dtype)
                if node.operator == _WRITES_CACHE:
                    self.writers[given.value] = node.index

    def _parameter(self, register: int) -> str:
        names = self.program.function(self.function).names
        return names[register] if register < len(names) else ""

    def _follow(self, call: Call, name: str) -> None:
        """A call that launches nothing: what it makes is new, or what it was given under another name."""
        if call.target == VOID:
            return
        given = [one.value for one in call.arguments if one.source is Source.REGISTER]
        self.writers.pop(call.target, None)
        self.tuples.pop(call.target, None)
        same: int | None = None
        if name in _SAME and given:
            same = given[0]
        elif name == _TUPLE:
            self.tuples[call.target] = given
        elif name == _ITEM and given and given[0] in self.tuples:
            same = self.tuples[given[0]][call.arguments[1].value]
        if same is not None and same in self.writers:
            self.writers[call.target] = self.writers[same]
