"""A tiny model in which two kernels in C serve one site; each folder's session compiles it once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from relax_llm.runtime.recording.replay import Replay
from tests.artifact.checkpoints import LLAMA, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = [3, 1, 4, 1, 5]

KERNELS = '''
import relax_llm as rl

SOURCE = """
#include <stdint.h>
#include "sizes.h"
void NAME(const float *x, const float *weight, float *out, Size M) {
  for (Size i = 0; i < M; i++)
    for (Size j = 0; j < N; j++) {
      float sum = 0;
      for (Size k = 0; k < K; k++) sum += x[i * K + k] * weight[j * K + k];
      out[i * N + j] = sum;
    }
}
"""


def written(name):
    from pathlib import Path

    file = Path(__file__).with_name(f"{name}.c")
    file.write_text(SOURCE.replace("NAME", name))
    return file


HEADER = __file__.replace("kernels.py", "sizes.h")


@rl.kernel("matmul", m=(1, 8), sites="*.down_proj", files=(str(written("few_rows")), HEADER))
def few_rows(problem):
    return written("few_rows")


@rl.kernel("matmul", sites="*.down_proj", files=(str(written("any_rows")), HEADER))
def any_rows(problem):
    return written("any_rows")
'''

DOWN = "layers.0.mlp.down_proj"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a file with kernels for it."""
    folder = tmp_path_factory.mktemp("recording")
    (folder / "sizes.h").write_text("typedef int64_t Size;\n")
    (folder / "kernels.py").write_text(KERNELS)
    return write(folder / "checkpoint", LLAMA | {"num_hidden_layers": 2}), folder / "kernels.py"


@pytest.fixture(scope="module")
def artifact(sources: tuple[Path, Path], plainer_machine: None) -> rl.Artifact:
    """The model with the kernels in C; the cache has it after the first time."""
    return rl.compile(sources[0], kernels=[sources[1]])


@pytest.fixture(scope="module")
def runner(artifact: rl.Artifact) -> rl.Runner:
    """Of it."""
    return rl.Runner(artifact)


@pytest.fixture(scope="module")
def recorded(runner: rl.Runner, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Replay]:
    """Record a prefill and a decode, and open the recording."""
    folder = tmp_path_factory.mktemp("recorded")

    def record(**options: object) -> Replay:
        path = folder / f"{len(list(folder.iterdir()))}.rec"
        with runner.recording(path, **options):  # type: ignore[arg-type]
            state = runner.start()
            runner.prefill(state, IDS)
            runner.decode(state, 4)
        return rl.replay(path)

    return record
