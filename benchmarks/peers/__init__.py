"""Who is measured: one module for each engine, as `engine.Engine` says. To add one, name it here."""

from benchmarks.peers import (
    ctranslate2,
    ik_llama_cpp,
    llama_cpp,
    onnxruntime,
    openvino,
    relax_llm,
    torch,
    tvm_default,
)
from benchmarks.peers.engine import Answer, Engine, Stamps

__all__ = ["ENGINES", "OURS", "Answer", "Engine", "Stamps"]

OURS: Engine = relax_llm

ENGINES: tuple[Engine, ...] = (
    OURS,
    llama_cpp,
    ik_llama_cpp,
    openvino,
    onnxruntime,
    ctranslate2,
    torch,
    tvm_default,
)
