"""The artifact: what the compiler writes and the runtime reads."""

from relax_llm.artifact.artifact import Artifact, load
from relax_llm.artifact.manifest import Manifest

__all__ = ["Artifact", "Manifest", "load"]
