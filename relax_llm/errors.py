"""The one exception hierarchy. A message is a sentence to the person who caused it: what, where, what to do."""


class RelaxLLMError(Exception):
    """Anything that this package refuses, with a sentence that says why and what to do about it."""


class CheckpointError(RelaxLLMError):
    """A checkpoint cannot be read as it stands: missing, truncated, contradictory or not supported."""


class ArchitectureError(RelaxLLMError):
    """No architecture fits the checkpoint, or an architecture file is not usable."""


class TokenizerError(RelaxLLMError):
    """A tokenizer or chat template cannot be built or applied."""


class KernelError(RelaxLLMError):
    """A kernel does not solve the problem it was given."""


class PlanError(RelaxLLMError):
    """A plan is not total, names unknown kernels or sites, or cannot be read."""


class CompileError(RelaxLLMError):
    """The compiler pipeline cannot produce an artifact for this model and target."""


class ArtifactError(RelaxLLMError):
    """An artifact cannot be loaded or saved: missing or changed files, another TVM, another CPU."""


class InputError(RelaxLLMError, ValueError):
    """A call to a runner that cannot be served: token ids out of range, an empty prompt, a bad option."""


class ContextLengthError(InputError):
    """The tokens asked for do not fit the model's context length."""


class RecordingError(RelaxLLMError):
    """A recording cannot be written, read or replayed, or a launch cannot be made reproducible without this package."""
