"""`relax-llm compare` and `relax-llm bisect`: what they print, as which exit status, and what they refuse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from relax_llm.cli import main
from tests.finding.planting import ALSO_GUILTY, GUILTY, UNTRIED, bad_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import relax_llm as rl

SIZE = ("--length", str(UNTRIED), "--decodes", "1")


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit status, standard output, standard error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def directory(planted: rl.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted artifact, whose own plan has the wrong kernel nowhere, and a plan that has it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "bad.json").write_text(bad_plan(planted.plan).to_json())
    return planted.save(folder / "model").path


def test_a_plan_that_is_wrong(call: Callable[..., tuple[int, str, str]], directory: Path) -> None:
    bad = directory.parent / "bad.json"
    code, out, err = call("compare", directory, "--plan", bad, *SIZE)
    assert code == 1
    assert f"The first site over its bound is {ALSO_GUILTY}: the matmul by wrong" in out
    assert "layers.*.mlp.down_proj (6)" in out
    assert "1 more site is over, each by itself." in out
    assert "--sites shows every launch" in err
    code, out, err = call("compare", directory, "--plan", bad, *SIZE, "--sites")
    assert code == 1
    marked = [line.split() for line in out.splitlines() if "<-" in line]
    assert [(words[2], words[-2:]) for words in marked] == [
        (ALSO_GUILTY, ["<-", "first"]),
        (GUILTY, marked[1][-2:]),
    ]
    code, out, err = call("compare", directory, "--plan", bad, *SIZE, "--json")
    assert code == 1
    assert json.loads(out)["over"] == [ALSO_GUILTY, GUILTY]
    assert "--sites" not in err
    assert call("compare", directory, "--plan", bad, "--length", "12")[0] == 0


def test_two_models(call: Callable[..., tuple[int, str, str]], directory: Path) -> None:
    code, out, _ = call("compare", directory, directory, *SIZE)
    assert code == 0
    assert "All 47 sites that can be compared are within their bounds." in out
    assert "The likeliest token is the same in 2 of 2 calls." in out
    assert call("compare", directory, directory, "--ids", "--prompt", "1 2 3", "-n", "0")[0] == 0


def test_a_kernel_beside_the_others(call: Callable[..., tuple[int, str, str]], directory: Path) -> None:
    code, out, _ = call("compare", directory, "--shadow", "wrong", *SIZE)
    assert code == 1
    assert f"wrong disagrees at 2 of 4 launches, at 2 sites; first at {ALSO_GUILTY}" in out
    assert f"Sites that disagree: {ALSO_GUILTY}, {GUILTY}." in out
    code, out, _ = call("compare", directory, "--shadow", "float64", "--site", "*norm", *SIZE, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["first"] is None
    assert found["launches"] == 2 * (2 * 6 + 1)
    code, out, _ = call("compare", directory, "--shadow", "also_right", "--site", GUILTY, *SIZE)
    assert code == 0
    assert "also_right agrees at 2 launches" in out


def test_bisect(call: Callable[..., tuple[int, str, str]], directory: Path, planted: rl.Artifact) -> None:
    own = json.loads(planted.plan.to_json())
    for entry in own["entries"]:
        if entry["sites"][0].endswith("down_proj"):
            entry["ranges"] = [{"sizes": {"M": [1, None]}, "kernel": "right"}]
    good = directory.parent / "good.json"
    good.write_text(json.dumps(own))
    arguments = ("bisect", directory, "--good", good, "--bad", directory.parent / "bad.json", *SIZE)
    code, out, _ = call(*arguments)
    assert code == 0
    for site in (GUILTY, ALSO_GUILTY):
        assert (
            f"matmul at {site} by wrong (M = 11), right (M = 1), and not right (M = 1..11): it alone" in out
        )
    code, out, _ = call(*arguments, "--json")
    found = json.loads(out)
    assert sorted(change["site"] for (change,) in found["culprits"]) == [ALSO_GUILTY, GUILTY]
    assert found["complete"]
    assert found["steady"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "MODEL"], "There is nothing to compare with"),
        (["compare", "MODEL", "MODEL", "--reference", "x"], "OTHER and --reference are several things"),
        (["compare", "MODEL", "MODEL", "--site", "norm"], "--site goes with --shadow"),
        (["compare", "MODEL", "--shadow", "right", "--plan", "x"], "leave out --plan"),
        (["compare", "MODEL", "--shadow", "nothing"], "No kernel 'nothing' can stand beside"),
        (["compare", "MODEL", "--reference", "nowhere"], "no such file or directory"),
        (["compare", "nowhere", "MODEL"], "no such file or directory"),
        (["compare", "MODEL", "--plan", "nowhere.json"], "nowhere.json cannot be read"),
        (["compare", "MODEL", "MODEL", "--ids"], "--ids says how to read --prompt"),
        (["compare", "MODEL", "MODEL", "--prompt", "text"], "no tokenizer"),
        (["compare", "MODEL", "MODEL", "--length", "0"], "at least 1"),
        (["compare", "MODEL", "MODEL", "--bound", "-1"], "bound must be a share"),
        (["compare", "MODEL", "MODEL", "--decodes", "many"], "valid integer"),
        (["bisect", "MODEL"], "Name two ways"),
        (["bisect", "MODEL", "MODEL", "--bad", "x"], "Name two ways"),
        (["bisect", "MODEL", "MODEL", "--good", "x"], "Name two ways"),
        (
            ["bisect", "MODEL", "MODEL", "--length", "5"],
            "The bad way gives a right result: its logits are off by 0",
        ),
        (["bisect", "MODEL", "--bad", "nowhere.json"], "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(
    call: Callable[..., tuple[int, str, str]], directory: Path, arguments: list[str], said: str
) -> None:
    code, out, err = call(*(directory if word == "MODEL" else word for word in arguments))
    assert code == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
