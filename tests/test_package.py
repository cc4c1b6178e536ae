"""The package: what it shows, what importing it costs, and that everything is in the wheel."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import relax_llm
import relax_llm.models
from relax_llm.errors import RelaxLLMError

ROOT = Path(__file__).resolve().parents[1]


def _fresh(code: str, *, path: Path | None = None) -> str:
    """What a new interpreter, outside of the project's folder, prints."""
    if path is not None:
        code = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there() -> None:
    assert sorted(relax_llm.__all__) == list(relax_llm.__all__)
    for name in relax_llm.__all__:
        value = getattr(relax_llm, name)  # a class, a function, or an object that has a name
        assert getattr(value, "__name__", None) == name or value.name == name
        assert name in dir(relax_llm)


def test_no_other_name_is() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = relax_llm.nothing


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = ["tvm", "tvm_ffi", "torch", "transformers", "numpy", "tokenizers", "rich"]
    assert _fresh(f"import sys, relax_llm; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_command_line_starts_without_a_compiler_or_pytorch() -> None:
    heavy = ["tvm", "torch", "transformers"]
    assert (
        _fresh(f"import sys, relax_llm.cli; print([name for name in {heavy} if name in sys.modules])") == "[]"
    )


def test_no_public_name_imports_pytorch() -> None:
    code = (
        "import sys, relax_llm; [getattr(relax_llm, name) for name in relax_llm.__all__]; "
        "print([name for name in ('tvm', 'torch') if name in sys.modules])"
    )
    assert _fresh(code) == "['tvm']"


def test_errors_have_one_root() -> None:
    errors = importlib.import_module("relax_llm.errors")
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(found) > 1
    assert all(issubclass(error, RelaxLLMError) for error in found)


def test_the_version_is_that_of_the_project() -> None:
    declared = [
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = ")
    ]
    assert declared == [f'version = "{metadata.version("relax-llm")}"']


def test_every_module_can_be_imported() -> None:
    names = [module.name for module in pkgutil.walk_packages(relax_llm.__path__, "relax_llm.")]
    names += [module.name for module in pkgutil.walk_packages(relax_llm.models.__path__, "relax_llm.models.")]
    assert "relax_llm.models.llama" in names
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def test_the_command_is_installed() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="relax-llm")
    assert command.value == "relax_llm.cli:main"
    assert callable(command.load())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it, from a copy of the project."""
    directory = tmp_path_factory.mktemp("wheel")
    project = directory / "project"
    project.mkdir()
    for name in ("relax_llm", "models"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(directory)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    expected = {file.relative_to(ROOT).as_posix() for file in (ROOT / "relax_llm").rglob("*.py")}
    expected |= {f"relax_llm/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "models").rglob("*.py")}
    expected |= {"relax_llm/py.typed", "relax_llm/kernels/threads.cpp", "relax_llm/kernels/ahead.hpp"}
    expected |= {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "relax_llm" / "graph" / "assets").iterdir()
        if file.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == expected
    assert any(name.endswith("LICENSE") for name in information)


def test_architectures_are_found_in_the_wheel(wheel: Path) -> None:
    place = _fresh("import relax_llm.models.llama as m; print(m.__file__)", path=wheel)
    assert place == str(wheel / "relax_llm" / "models" / "llama.py")
