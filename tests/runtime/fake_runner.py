"""A small language model in NumPy with the face of a Runner, and a tokenizer with one token for each byte."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from relax_llm.errors import ContextLengthError, InputError
from relax_llm.runtime.interface import Likeliest
from relax_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

START, END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> Tokenizer:
    """One token for each byte, then the two special tokens of ChatML; the second ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, END])
    return Tokenizer.build(
        backend,
        {"bos_token": START, "eos_token": END},
        {} if chat_template is None else {"default": chat_template},
    )


class FakeState:
    """A cache: the tokens, and the hidden vector after each."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.hidden: list[npt.NDArray[np.float64]] = []
        self.cut: list[tuple[int, npt.NDArray[np.float64]]] = []

    @property
    def length(self) -> int:
        return len(self.hidden)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError(f"cannot cut {self.length} tokens to {length}")
        self.cut = [*zip(self.tokens[length:], self.hidden[length:], strict=True), *self.cut]
        del self.tokens[length:], self.hidden[length:]

    def restore(self, token_ids: Sequence[int]) -> bool:
        count = len(token_ids)
        if [token_id for token_id, _ in self.cut[:count]] != list(token_ids):
            return False
        self.tokens += token_ids
        self.hidden += [hidden for _, hidden in self.cut[:count]]
        del self.cut[:count]
        return True

    def fork(self) -> FakeState:
        return copy.deepcopy(self)


class FakeRunner:
    """A recurrent network whose logits depend on every token in the cache and their order.

    A cache that is wrong anywhere gives other logits, and so other text. With `says`, the token that it
    returns for the tokens so far is made the likeliest by far.
    """

    def __init__(
        self,
        *,
        context_length: int = 400,
        tokenizer: Tokenizer | None = None,
        generation_config: Mapping[str, Any] | None = None,
        says: Callable[[list[int]], int] | None = None,
        seed: int = 0,
        tokens_alike: int | None = None,
    ) -> None:
        random = np.random.default_rng(seed)
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.vocab_size = 264  # longer than the tokenizer's, as in padded models
        self.generation_config = dict(generation_config or {})
        self.says = says
        self.tokens_alike = tokens_alike
        self.evaluated: list[int] = []  # tokens of each call
        self.taken = 0  # calls of `greedy`
        self._embedding = random.normal(size=(self.vocab_size, 16))
        self._recurrent = random.normal(size=(16, 16)) / 3
        self._head = random.normal(size=(self.vocab_size, 16))

    def start(self) -> FakeState:
        return FakeState()

    def prefill(
        self, state: FakeState, token_ids: Sequence[int], output: str = "last"
    ) -> npt.NDArray[np.float32]:
        if len(state.tokens) + len(token_ids) > self.context_length:
            raise ContextLengthError("the cache is full")
        assert len(token_ids) > 0
        self.evaluated.append(len(token_ids))
        state.cut.clear()
        logits = []
        for token_id in token_ids:
            before = state.hidden[-1] if state.hidden else np.zeros(16)
            state.hidden.append(np.tanh(self._recurrent @ before + self._embedding[token_id]))
            state.tokens.append(token_id)
            logits.append((self._head @ state.hidden[-1]).astype(np.float32))
            if self.says is not None:
                logits[-1][self.says(state.tokens)] += 100
        return np.stack(logits) if output == "all" else logits[-1]

    def decode(self, state: FakeState, token_id: int) -> npt.NDArray[np.float32]:
        return self.prefill(state, [token_id])

    def greedy(self, state: FakeState, token_ids: int | Sequence[int]) -> Likeliest:
        self.taken += 1
        logits = self.prefill(state, [token_ids] if isinstance(token_ids, int) else token_ids)
        token_id = int(logits.argmax())
        return Likeliest(token_id, float(logits[token_id]))


def speaker(
    tokenizer: Tokenizer, prompt: str, answer: str, *, special: bool = False
) -> Callable[[list[int]], int]:
    """For `says`: after `prompt`, the tokens of `answer` and then the end of the turn for ever.

    With `special`, the prompt gets its special tokens as the answer's caller would have them put.
    """
    begin = len(tokenizer.encode(prompt, add_special_tokens=special))
    script = tokenizer.encode(answer, add_special_tokens=False)
    end = tokenizer.eos_id
    assert end is not None

    def says(tokens: list[int]) -> int:
        said = len(tokens) - begin
        return script[said] if 0 <= said < len(script) else end

    return says
