"""Measurements of dllama, beside llama.cpp on the same weights: one script a question, results beside it."""
