"""Checkpoints of a loop: one file, or one folder of the files of all ranks."""
