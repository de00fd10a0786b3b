"""Optimiser and learning-rate schedule."""
