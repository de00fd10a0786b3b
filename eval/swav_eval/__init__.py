"""Protocols that judge a backbone, one module each."""
