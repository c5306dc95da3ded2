"""Sparse attention for prompts: patterns, plans, their search, costs, and the function that transformers calls."""
