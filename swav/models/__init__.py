"""Backbones, heads and the multi-crop forward pass."""
