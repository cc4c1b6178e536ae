"""Text to token ids and back: tokenizers, chat templates, incremental decoding."""

from relax_llm.text.chat import render_chat
from relax_llm.text.detokenizer import Detokenizer
from relax_llm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "render_chat"]
