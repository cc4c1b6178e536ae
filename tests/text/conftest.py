"""Small tokenizers of both kinds, each as the library's class."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import relax_llm.text
from relax_llm.text.sentencepiece import SentencePieceVocab, sentencepiece_backend
from tests.text.models import SPECIAL, USER_DEFINED, train_byte_level, train_sentencepiece


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """The tokenizer.json of a byte-level model with special and user-defined tokens."""
    model = train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend = Tokenizer(models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in USER_DEFINED])
    document = json.loads(backend.to_str())
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return json.dumps(document)


@pytest.fixture(scope="session")
def byte_level(byte_level_json: str) -> relax_llm.text.Tokenizer:
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return relax_llm.text.Tokenizer.build(Tokenizer.from_str(byte_level_json), roles, {})


@pytest.fixture(scope="session")
def sentencepiece() -> relax_llm.text.Tokenizer:
    model = train_sentencepiece()
    vocab = SentencePieceVocab(model.pieces, model.scores, model.types, 0)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return relax_llm.text.Tokenizer.build(sentencepiece_backend(vocab, "model"), roles, {})
