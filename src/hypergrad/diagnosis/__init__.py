"""Advice before a long run: :func:`hypergrad.check` and its report."""
