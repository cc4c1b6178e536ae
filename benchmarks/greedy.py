"""What a greedy choice saves by an estimate of the head: tokens with and without it, and how much of the head is read.

python -m benchmarks.greedy [CHECKPOINT] [--weights f32 bf16 q8 q4] [--tokens 256] [--rounds 15]

Both artifacts generate in turns in one process; ratios are medians over the rounds. How much of the head is read is
counted along a text, token by token, from the logits that are those of `decode`: they come in panels of 32.
"""

import argparse
import time
from statistics import median

import numpy as np

import relax_llm as rl
from benchmarks.models import options_of
from benchmarks.quality import text

_NEW = 40
_CONTEXT = 16


def main() -> None:
    """Measure and print."""
    options = _options()
    print(
        "weights     with   without   ratio   other choices   of the head read: median, 90 % of tokens, at most"
    )
    for weights in options.weights:
        passes = rl.pipeline()
        passes.remove("ScreenHead")
        screened = rl.Runner(rl.compile(options.checkpoint, weights=weights))
        plain = rl.Runner(rl.compile(options.checkpoint, weights=weights, pipeline=passes))
        if "contenders" not in screened.artifact.manifest.functions:
            print(f"{weights:<10}the head is read as it is")
            continue
        seconds: dict[rl.Runner, list[float]] = {screened: [], plain: []}
        for turn in range(options.rounds + 1):
            for runner in (screened, plain) if turn % 2 else (plain, screened):
                taken = _seconds_of_a_token(runner)
                if turn:
                    seconds[runner].append(taken)
        ours, theirs = seconds[screened], seconds[plain]
        ratio = median(there / here for here, there in zip(ours, theirs, strict=True))
        shares, wrong = _read(screened, options.tokens)
        middle, most, all_of_it = (100 * float(np.quantile(shares, at)) for at in (0.5, 0.9, 1))
        print(
            f"{weights:<10}{1e3 * median(ours):6.2f} ms{1e3 * median(theirs):7.2f} ms{ratio:8.3f}{wrong:11}"
            f"             {middle:.2f} %, {most:.2f} %, {all_of_it:.2f} %"
        )


def _seconds_of_a_token(runner: rl.Runner) -> float:
    pieces = runner.stream([5] * _CONTEXT, max_new_tokens=_NEW, temperature=0, stop_tokens=[])
    stamps = [time.perf_counter() for _ in pieces]
    return float(np.median(np.diff(stamps)[1:]))


def _read(runner: rl.Runner, count: int) -> tuple[list[float], int]:
    """The share of the head that each token of a text reads, and how many choices are not those of all logits."""
    tokenizer = runner.tokenizer
    assert tokenizer is not None
    ours, plain = runner.start(), runner.start()
    shares, wrong = [], 0
    for token_id in tokenizer.encode(text())[:count]:
        with runner.steps("contenders", ours, [token_id]) as steps:
            found = steps.finish()
        logits = runner.decode(plain, token_id)
        same = found == logits
        shares.append(float(np.mean(same)))
        wrong += int(found.argmax() != logits.argmax() or found.max() != logits.max())
    return shares, wrong


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", default=["f32", "bf16", "q8", "q4"])
    parser.add_argument("--tokens", type=int, default=256, help="of a text along which choices are compared")
    parser.add_argument("--rounds", type=int, default=15)
    return options_of(parser)


if __name__ == "__main__":
    main()
