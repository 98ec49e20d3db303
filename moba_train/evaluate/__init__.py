"""Evaluators: each reads a model and yields (name, value)."""
