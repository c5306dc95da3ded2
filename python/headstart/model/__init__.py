"""Whole models: opened from a checkpoint."""
