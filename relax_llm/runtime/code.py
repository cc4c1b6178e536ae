"""What has a kernel, and with it the kernel's listing: a launch, a kernel on its own."""

from abc import ABC, abstractmethod

from relax_llm.artifact.listings import Listing, Source


class HasCode(ABC):
    """Something that one kernel of a library computes."""

    @property
    @abstractmethod
    def listing(self) -> Listing:
        """What the kernel was made from and into.

        Raises:
            ArtifactError: The artifact has no listings.
        """

    @property
    def source(self) -> Source | None:
        """What a person wrote of the kernel; None where nobody did."""
        return self.listing.source

    @property
    def tir(self) -> str:
        """The kernel as TVMScript."""
        return self.listing.tir

    @property
    def llvm(self) -> str:
        """The kernel as LLVM IR."""
        return self.listing.llvm

    @property
    def assembly(self) -> str:
        """The kernel as assembly."""
        return self.listing.assembly
