"""The built-in architectures, one file each, written against `relax_llm.layers` alone, as a user's own would be."""
