"""Backbones in the formats of others, each tried there before it is kept."""
