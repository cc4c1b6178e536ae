"""The code of kernels, in the forms in which an artifact keeps it."""

from collections.abc import Sequence
from pathlib import Path

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.implementations import implementations
from relax_llm.artifact.listings import Listing
from relax_llm.artifact.manifest import Manifest
from relax_llm.cli import screen
from relax_llm.errors import InputError

_COMMENTS = {"source": "#", "tir": "#", "llvm": ";", "assembly": "#"}


def show(path: Path, manifest: Manifest, form: str, name: str) -> None:
    """Print the code of some kernels.

    Args:
        path: Of the artifact.
        manifest: What it says of itself.
        form: "source", "tir", "llvm" or "assembly".
        name: A function of the library, a kernel as the plan calls it, or a site.

    Raises:
        InputError: There is nothing of this name; what there is is said.
        ArtifactError: The artifact has no listings.
    """
    artifact = Artifact(path, manifest)
    for symbol in _symbols(artifact, name):
        screen.write(f"{_COMMENTS[form]} {symbol}\n{_text(artifact.listing(symbol), form).rstrip()}\n\n")


def _symbols(artifact: Artifact, name: str) -> Sequence[str]:
    index = artifact.listings.index
    if name in index.parameters:
        return [name]
    known = implementations(artifact.manifest, artifact.plan, index.kernels)
    own = [one for one in known if one.index is not None or one.symbol not in index.kernels]
    found = [one.code for one in own if one.is_at(name) or one.kernel == name]
    if not found:
        sites = ", ".join(list(dict.fromkeys(site for one in own for site in one.sites))[:5])
        kernels = ", ".join(dict.fromkeys(one.kernel for one in own))
        raise InputError(
            f"There is no kernel and no site {name!r}. Kernels are {kernels}; sites are named like {sites}."
        )
    return list(dict.fromkeys(found))


def _text(listing: Listing, form: str) -> str:
    if form == "source":
        return str(listing.source or "# Nobody wrote this: TVM or this package made it of other functions.")
    return {"tir": lambda: listing.tir, "llvm": lambda: listing.llvm, "assembly": lambda: listing.assembly}[
        form
    ]()
