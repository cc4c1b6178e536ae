"""Conversations: what the model is shown, what the history keeps, and what the cache spares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from relax_llm.errors import ContextLengthError, InputError, RelaxLLMError, TokenizerError
from relax_llm.runtime.chat import Chat
from relax_llm.runtime.generation import generate

from .fake_runner import CHATML, FakeRunner, FakeState, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = byte_tokenizer()


def asked(tokens: list[int]) -> tuple[str, str]:
    """The last turn of the user that a model sees, and what it has answered so far."""
    text = TOKENIZER.decode(tokens, skip_special_tokens=False)
    *_, question, answer = text.split("<|im_start|>")
    return question.removeprefix("user\n").removesuffix("<|im_end|>\n"), answer.removeprefix("assistant\n")


def echo(tokens: list[int]) -> int:
    """A model that answers every question with the question in brackets."""
    question, said = asked(tokens)
    answer = TOKENIZER.encode(f"[{question}]")
    done = len(TOKENIZER.encode(said))
    end = TOKENIZER.eos_id
    assert end is not None
    return answer[done] if done < len(answer) else end


def echoing(**more: Any) -> FakeRunner:
    return FakeRunner(tokenizer=TOKENIZER, says=echo, **more)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages]


def shown(chat: Chat) -> str:
    """The text in the cache."""
    assert chat.state is not None
    return TOKENIZER.decode(chat.state.tokens, skip_special_tokens=False)


def test_turns_follow_one_another() -> None:
    chat = Chat(echoing(), system="Echo.")
    assert chat.state is None
    assert chat.ask("one").text == "[one]"
    assert "".join(piece.text for piece in chat.send("two")) == "[two]"
    assert chat.messages == (
        message("system", "Echo."),
        message("user", "one"),
        message("assistant", "[one]"),
        message("user", "two"),
        message("assistant", "[two]"),
    )
    assert shown(chat) == (
        "<|im_start|>system\nEcho.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n[one]"
        "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n[two]"
    )


def test_a_turn_evaluates_only_what_is_new() -> None:
    runner = echoing()
    chat = Chat(runner)
    chat.ask("one")
    runner.evaluated.clear()
    second = chat.ask("two")
    new = "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert runner.evaluated[0] == len(TOKENIZER.encode(new))
    assert second.timings.prompt_tokens - second.timings.reused_tokens == runner.evaluated[0]


def test_the_answer_is_that_of_the_whole_conversation() -> None:
    """With a model that depends on every token, and sampling: the cache changes nothing."""
    chat = Chat(FakeRunner(tokenizer=TOKENIZER, seed=3, context_length=2000), system="S")
    for turn in range(4):
        answer = chat.ask(f"turn {turn}", max_new_tokens=9, temperature=0.9, seed=turn)
        *before, _ = chat.messages
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in before)
        fresh = FakeRunner(tokenizer=TOKENIZER, seed=3, context_length=2000)
        alone = generate(
            fresh, text + "<|im_start|>assistant\n", max_new_tokens=9, temperature=0.9, seed=turn
        )
        assert answer.token_ids == alone.token_ids


def test_reset_keeps_the_system_prompt_and_what_is_cached_of_it() -> None:
    runner = echoing()
    chat = Chat(runner, system="Echo everything that is said.")
    chat.ask("one")
    chat.reset()
    assert chat.messages == (message("system", "Echo everything that is said."),)
    assert chat.ask("two").timings.reused_tokens > len("Echo everything that is said.")
    plain = Chat(runner)
    plain.ask("one")
    plain.reset()
    assert plain.messages == ()


def test_earlier_messages_are_gone_on_from() -> None:
    earlier = [message("user", "a"), message("assistant", "b")]
    chat = Chat(echoing(), system="S", messages=earlier)
    chat.ask("c")
    assert chat.messages == (
        message("system", "S"),
        *earlier,
        message("user", "c"),
        message("assistant", "[c]"),
    )
    chat.messages[0]["content"] = "changed"
    assert chat.messages[0]["content"] == "S"
    assert earlier == [message("user", "a"), message("assistant", "b")]


def test_template_and_variables_of_ones_own() -> None:
    template = "{{ bos_token }}{{ mood }}:{% for m in messages %}{{ m['content'] }};{% endfor %}"
    runner = FakeRunner(tokenizer=byte_tokenizer(None))
    chat = Chat(runner, template=template, variables={"mood": "calm"})
    chat.ask("hello", max_new_tokens=1)
    assert shown(chat) == "<|im_start|>calm:hello;"


@pytest.mark.parametrize("taken", [1, 3, 6])
def test_an_answer_that_is_closed_stays_as_far_as_it_was_said(taken: int) -> None:
    chat = Chat(echoing())
    answer = chat.send("hello")
    for _ in range(taken):
        next(answer)
    answer.close()
    assert chat.messages == (message("user", "hello"), message("assistant", "[hello]"[:taken]))
    assert chat.ask("more").text == "[more]"
    assert contents(chat) == ["hello", "[hello]"[:taken], "more", "[more]"]


def test_an_answer_that_is_left_alone_ends_with_the_next_turn() -> None:
    """As when Ctrl-C comes while the caller prints: nobody closes the generator."""
    chat = Chat(echoing())
    answer = chat.send("hello")
    next(answer)
    next(answer)
    assert chat.messages[-1] == message("assistant", "[h")
    assert chat.ask("more").text == "[more]"
    assert list(answer) == []
    assert contents(chat) == ["hello", "[h", "more", "[more]"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RelaxLLMError])
@pytest.mark.parametrize("position", ["prompt", "answer"])
def test_an_error_in_the_model_keeps_what_was_said(error: type[BaseException], position: str) -> None:
    class Failing(FakeRunner):
        fails = False

        def prefill(self, state: FakeState, token_ids: Sequence[int], output: str = "last") -> Any:
            if self.fails and (position == "prompt" or TOKENIZER.decode(state.tokens).endswith("[hel")):
                raise error("stopped")
            return super().prefill(state, token_ids, output)

    runner = Failing(tokenizer=TOKENIZER, says=echo)
    chat = Chat(runner)
    chat.ask("first")
    runner.fails = True
    with pytest.raises(error, match="stopped"):
        chat.ask("hello")
    runner.fails = False
    said = [] if position == "prompt" else ["hello", "[hell"]
    assert contents(chat) == ["first", "[first]", *said]
    assert chat.ask("again").text == "[again]"
    assert contents(chat) == ["first", "[first]", *said, "again", "[again]"]


def test_a_question_that_was_not_answered_yet_is_withdrawn() -> None:
    """The first token may have no text yet: it may begin a stop string."""
    chat = Chat(echoing())
    answer = chat.send("hello", stop=["[hello"])
    assert next(answer).text == ""
    answer.close()
    assert list(chat.messages) == []
    finished = chat.ask("hello", stop=["[hello"])
    assert (finished.text, finished.finish_reason) == ("", "stop_string")
    assert chat.messages == (message("user", "hello"), message("assistant", "")), (
        "an empty answer is an answer"
    )


def test_a_turn_never_begun_leaves_nothing() -> None:
    runner = echoing()
    chat = Chat(runner)
    chat.send("hello")
    assert runner.evaluated == []
    assert list(chat.messages) == []
    assert chat.ask("more").text == "[more]"
    assert len(chat.messages) == 2


def length(*contents: str) -> int:
    """Tokens of a conversation with these contents, up to the beginning of the next answer."""
    per_message = len(TOKENIZER.encode("<|im_start|>user\n<|im_end|>\n"))
    roles = sum(5 if index % 2 else 0 for index in range(len(contents)))  # "assistant" for "user"
    return per_message * len(contents) + roles + sum(map(len, contents)) + len("assistant\n") + 1


def test_overflow_is_refused_with_advice() -> None:
    fits = length("one", "[one]", "two")
    for context, refused in [(fits, True), (fits + 1, False)]:
        chat = Chat(echoing(context_length=context))
        chat.ask("one")
        if refused:
            with pytest.raises(ContextLengthError, match=f"has {fits} tokens .*holds {context}.*drop_oldest"):
                chat.send("two")
            assert len(chat.messages) == 2
        else:
            answer = chat.ask("two")
            assert (answer.text, answer.finish_reason) == ("[t", "context")


@pytest.mark.parametrize("overflow", ["error", "drop_oldest"])
def test_a_turn_that_is_too_long_alone_is_refused(overflow: Any) -> None:
    chat = Chat(echoing(context_length=60), system="S", overflow=overflow)
    with pytest.raises(ContextLengthError, match="no older turns to forget: shorten the text"):
        chat.send("x" * 60)
    assert chat.messages == (message("system", "S"),)
    assert chat.ask("y", max_new_tokens=1).text == "["


def test_the_oldest_turns_are_dropped_where_that_is_asked() -> None:
    runner = echoing(context_length=150)
    chat = Chat(runner, system="S", overflow="drop_oldest", room=12)
    for turn in range(12):
        assert chat.ask(f"turn {turn}").text == f"[turn {turn}]"
        system, *others = chat.messages
        assert system == message("system", "S")
        assert [m["role"] for m in others] == ["user", "assistant"] * (len(others) // 2)
        assert others[-1]["content"] == f"[turn {turn}]"
        assert chat.dropped + len(others) == 2 * (turn + 1)
        first = int(others[0]["content"].removeprefix("turn "))
        kept = [f"turn {n}" for n in range(first, turn + 1)]
        assert [m["content"] for m in others[::2]] == kept, "the newest turns are the ones that stay"
        said = sum(
            len(TOKENIZER.encode(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"))
            for m in chat.messages
        )
        assert said <= 150
    assert chat.dropped > 0
    assert len(chat.messages) > 3, "no more is dropped than has to be"


def test_only_as_many_turns_are_dropped_as_need_be() -> None:
    texts = ["one", "[one]", "two", "[two]", "six"]
    whole, shorter = length(*texts), length(*texts[2:])
    for context, dropped in [(whole + 6, 0), (whole + 5, 2), (shorter + 6, 2), (shorter + 5, 4), (40, 4)]:
        earlier = [message(("user", "assistant")[i % 2], c) for i, c in enumerate(texts[:-1])]
        chat = Chat(echoing(context_length=context), messages=earlier, overflow="drop_oldest", room=6)
        assert chat.ask("six").text == "[six]"
        assert chat.dropped == dropped


def test_many_old_turns_are_dropped_at_once() -> None:
    """A long saved conversation: the number of renderings grows with its logarithm."""
    rendered = []
    earlier = [message(("user", "assistant")[i % 2], f"{i}") for i in range(2000)]
    chat = Chat(echoing(context_length=200), messages=earlier, overflow="drop_oldest")
    encode = chat._encode

    def counting(messages: list[dict[str, str]]) -> list[int]:
        rendered.append(len(messages))
        return encode(messages)

    chat._encode = counting  # type: ignore[method-assign]
    assert chat.ask("now").text == "[now]"
    assert len(rendered) < 15
    assert 1990 < chat.dropped < 2000


def test_dropping_happens_with_the_answer_and_not_before() -> None:
    context = length("one", "[one]", "two", "[two]", "three, which is long")
    chat = Chat(echoing(context_length=context), overflow="drop_oldest", room=10)
    for text in ("one", "two"):
        chat.ask(text)
    before = chat.messages
    chat.send("three, which is long")
    assert chat.messages == before
    assert chat.dropped == 0
    chat.ask("three, which is long")
    assert chat.dropped > 0


def test_models_that_cannot_chat_are_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        Chat(FakeRunner())
    with pytest.raises(InputError, match="no chat template: it continues text"):
        Chat(FakeRunner(tokenizer=byte_tokenizer(None)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"overflow": "forget"}, "overflow is 'forget'"),
        ({"room": 0}, "room is 0"),
        ({"room": 400}, "room is 400"),
        ({"room": "x"}, "room is 'x'"),
        ({"messages": [{"role": "user"}]}, "must have a 'role' and a 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "must have a 'role' and a 'content'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Chat(echoing(), **options)


def test_a_turn_that_cannot_be_served_changes_nothing() -> None:
    refusing = CHATML + "{% if messages|length > 3 %}{{ raise_exception('Too much talk.') }}{% endif %}"
    chat = Chat(echoing(), template=refusing)
    chat.ask("one")
    with pytest.raises(TokenizerError, match="Too much talk"):
        Chat(echoing(), template=refusing, messages=[message("user", "x")] * 3).send("more")
    with pytest.raises(InputError, match="temperature is -1"):
        chat.send("two", temperature=-1)
    with pytest.raises(InputError, match="The turn is 3; it must be text"):
        chat.send(3)  # type: ignore[arg-type]
    assert len(chat.messages) == 2
    assert chat.ask("two").text == "[two]"
