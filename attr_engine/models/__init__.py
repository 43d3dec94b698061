"""Denoisers: the protocol, and the adapter of stable-audio-tools."""
