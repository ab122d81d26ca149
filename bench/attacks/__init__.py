"""Attempts to get an erased concept out of a model again, each written from its paper."""
