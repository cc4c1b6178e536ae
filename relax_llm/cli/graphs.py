"""The graph of a function as `relax-llm inspect` shows it: a page, Graphviz's language, JSON."""

from pathlib import Path
from typing import Any

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.manifest import Manifest
from relax_llm.cli import screen
from relax_llm.errors import ArtifactError, InputError
from relax_llm.graph.data import as_data as graph_data
from relax_llm.graph.dot import dot
from relax_llm.graph.graph import graph_of
from relax_llm.graph.page import page
from relax_llm.tracing.trace import Trace


def show_dot(path: Path, manifest: Manifest, function: str) -> None:
    """Print a graph in the language of Graphviz; raises as `graph_of` does."""
    screen.write(dot(graph_of(Artifact(path, manifest), function)))


def write_page(path: Path, manifest: Manifest, function: str, file: Path, trace: Path | None) -> None:
    """Write a graph as a page.

    Raises:
        InputError: There is no such function, the trace is not of it, or the file cannot be written.
        ArtifactError: The library cannot be loaded here.
    """
    if not file.parent.is_dir():
        raise InputError(f"{file} cannot be written: there is no directory {file.parent}.")
    artifact = Artifact(path, manifest)
    traced = None if trace is None else Trace.read(trace)
    text = page(graph_of(artifact, function), artifact, traced)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}.") from error
    screen.hint(f"The graph of {function} is in {file}; open it in a browser.")


def as_data(path: Path, manifest: Manifest, function: str) -> dict[str, Any]:
    """A graph for JSON; nothing, and a note, where the library cannot be loaded here."""
    artifact = Artifact(path, manifest)
    try:
        return {"graph": graph_data(graph_of(artifact, function), artifact)}
    except ArtifactError as refusal:
        screen.note(f"There is no graph in this: {refusal}")
        return {}
