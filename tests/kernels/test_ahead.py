"""Asking ahead: what follows what is learned, a thread goes on where it was, and kernels announce what they read."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import tvm
from tvm.support import cc

import relax_llm as rl
from relax_llm.compiler.ahead import announcing
from relax_llm.kernels import threads
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.operators import operator_of

from ..artifact.checkpoints import LLAMA, llama_shapes, tensors_for, write

if TYPE_CHECKING:
    from pathlib import Path

HEADER = threads.SOURCE.with_name("ahead.hpp")
LEVEL_3 = machine("x86-64-v3")

PROGRAM = r"""
#include <stdlib.h>
#include <initializer_list>
#include <stdio.h>
#include "ahead.hpp"

#define CHECK(what) do { if (!(what)) { printf("line %d: %s\n", __LINE__, #what); exit(1); } } while (0)

static const int64_t kStep = 512;
static Ahead ahead;  // all zeros, as in a library

static int steps(Ahead::Place &place, int thread, int threads, int most = 1 << 20) {
  int count = 0;
  ahead.ask(place, thread, threads, [&] { return count++ == most; });
  return count - (count > most);
}

static void begins(const char *start, int64_t bytes) { ahead.begins({start, bytes, 1, 0}); }

int main() {
  char *memory = static_cast<char *>(calloc(1, 1 << 20));
  const char *a = memory, *b = memory + 8192, *c = memory + 65536, *d = memory + 131072;
  const int64_t bytes = 8 * kStep, huge = 1ll << 40;
  Ahead::Place place;
  begins(a, bytes);
  CHECK(steps(place, 1, 2) <= 1);  // nothing is known to follow
  CHECK(!place.span.start);
  for (int time = 0; time < 2; time++) {
    begins(b, bytes);
    begins(c, bytes);
    begins(d, huge);
    begins(a, bytes);
    if (time == 0) CHECK(steps(place, 1, 2) <= 1 && !place.span.start);  // once is not enough
  }
  CHECK(steps(place, 1, 2, 3) == 3);  // interrupted in the share of b
  CHECK(place.span.start == b && place.share == bytes / 2 && place.at == 3 * kStep);
  CHECK(steps(place, 1, 2, 3) == 3);  // goes on: one step of b, two of c
  CHECK(place.span.start == c && place.at == 2 * kStep);
  begins(b, bytes);
  CHECK(steps(place, 1, 2, 1) == 1 && place.span.start == c && place.at == 3 * kStep);  // b is read now, c comes next
  begins(b, bytes);  // a product that announces itself twice
  begins(c, bytes);
  CHECK(steps(place, 1, 2, 1) == 1 && place.span.start == d && place.at == kStep);  // c is read now
  Ahead::Place other;
  CHECK(steps(other, 0, 4, 1) == 1 && other.span.start == d && other.share == huge / 4);
  CHECK(steps(place, 1, 2) < 1 << 20);  // no more than a cache holds
  CHECK(steps(place, 1, 2) == 0);
  begins(b, bytes);  // out of order: what was learned of c is another thing now
  CHECK(steps(other, 0, 4, 1) == 1 && other.span.start == c && other.at == kStep);

  // Caches: three heads of three steps, a page apart; two threads have a head and a half each.
  for (int time = 0; time < 2; time++) {
    begins(a, bytes);
    ahead.begins({d, 3 * kStep, 3, 4096});
  }
  begins(a, bytes);
  Ahead::Place second;
  CHECK(steps(second, 1, 2, 1) == 1 && second.share == 9 * kStep / 2);
  second.at = 0;
  CHECK(second.next(1) == d + 4096 + 3 * kStep / 2);
  CHECK(steps(second, 1, 2, 3) == 3 && second.next(1) == d + 2 * 4096 + 3 * kStep / 2);
  CHECK(second.next(0) == d + 4096);

  // Two conversations in turns: what follows is never the same as the time before, and nobody asks in vain.
  for (const char *cache : {c, d, c, d}) {
    begins(a, bytes);
    Ahead::Place nowhere;
    if (cache == d) CHECK(steps(nowhere, 1, 2) <= 1 && !nowhere.span.start);
    ahead.begins({cache, bytes, 3, 4096});
  }

  // Many layers, and caches of many conversations before them: what came after each is known.
  const auto somewhere = [](uint64_t number) {  // as if by chance
    number *= 0xbf58476d1ce4e5b9u;
    return reinterpret_cast<const char *>((number ^ number >> 27) * 0x94d049bb133111ebu >> 20 << 6);
  };
  const int layers = 200;
  for (int old = 0; old < 6000; old++) begins(somewhere(1000 + old), bytes);
  for (int time = 0; time < 3; time++)
    for (int layer = 0; layer < layers; layer++) begins(somewhere(1 + layer), bytes);
  for (int layer = 0; layer < layers; layer++) {
    begins(somewhere(1 + layer), bytes);
    Ahead::Place known;
    CHECK(steps(known, 0, 2, 1) == 1 && known.span.start == somewhere(1 + (layer + 1) % layers));
  }

  // Nothing to read: no bytes in a part, or none for each thread.
  for (const int64_t size : {int64_t{0}, int64_t{1}}) {
    for (int time = 0; time < 2; time++) {
      begins(a, bytes);
      ahead.begins({b, size, 1, 0});
    }
    begins(a, bytes);
    Ahead::Place none;
    CHECK(steps(none, 0, 2) <= 1);
  }
  return 0;
}
"""


def test_order_is_learned_and_places_are_kept(tmp_path: Path) -> None:
    compiler = cc.get_cc()
    assert compiler
    (tmp_path / "order.cpp").write_text(PROGRAM, encoding="utf-8")
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}"]
    subprocess.run([compiler, *flags, "order.cpp", "-o", "order", "-lstdc++"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "order"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", [None, "x86-64-v3", "aarch64"])
def test_every_product_announces_its_weight_and_attention_its_cache(
    tmp_path: Path, target: str | None
) -> None:
    source = write(tmp_path / "checkpoint", LLAMA, tensors_for(llama_shapes(LLAMA)))
    artifact = rl.compile(source, output=tmp_path / "artifact", target=target)
    kernels = artifact.manifest.kernels
    announced = {name for name in kernels if f"@{threads.ANNOUNCE}(" in artifact.listing(name).llvm}
    reading = {name for name, kernel in kernels.items() if kernel.operator in ("matmul", "attention")}
    assert {kernels[name].operator for name in reading} == {"matmul", "attention"}
    assert announced == (set() if target == "aarch64" else reading)  # for aarch64 loops run on TVM's threads


@pytest.mark.parametrize(
    ("window", "seq", "kv_len", "first", "tiles"),
    [
        (None, 1, 1000, 0, 63),
        (None, 16, 16, 0, 1),
        (300, 1, 1000, 43, 20),
        (300, 8, 1000, 43, 20),
        (300, 1, 50, 0, 4),
    ],
)
def test_attention_announces_what_it_sees_of_each_head(
    window: int | None, seq: int, kv_len: int, first: int, tiles: int
) -> None:
    problem = Attention(9, 3, 64, 0.125, window=window, cache="bf16")
    kernel = operator_of(problem).definition(problem)
    (func,) = announcing(tvm.IRModule({"attention": kernel}), LEVEL_3).functions.values()
    calls = [statement.value.args[1:] for statement in func.body.seq[:2]]
    sizes = {"batch": 2, "seq": seq, "tiles": 100, "kv_len": kv_len}

    def number(expr: object) -> object:
        return eval(str(expr), {"T": SimpleNamespace(max=max, int64=int), **sizes})  # an expression of ours

    tile = 64 * 16 * 2
    for name, (start, *numbers) in zip(("k_cache", "v_cache"), calls, strict=True):
        place = start.args[0]
        assert str(place).startswith(f"{name}[")
        assert [number(index) for index in place.indices] == [0, 0, first, 0, 0, 0]
        assert [number(one) for one in numbers] == [tiles * tile, 2 * 3, 100 * tile, 0]


@pytest.mark.parametrize(
    ("format", "paced"), [("f32", 1), ("bf16", 1), ("f16", 1), ("q8", 1), ("q6", 0), ("q4", 0), ("q4s", 0)]
)
def test_no_line_may_be_missing_where_a_core_reads_ahead_by_itself(format: str, paced: int) -> None:
    problem = Matmul(64, 64, format)
    kernel = operator_of(problem).definition(problem)
    younger = replace(LEVEL_3, features=LEVEL_3.features | {"avx_vnni"})
    for there, expected in ((LEVEL_3, paced), (younger, 0)):
        (func,) = announcing(tvm.IRModule({"matmul": kernel}), there).functions.values()
        assert int(func.body.seq[0].value.args[-1]) == expected
