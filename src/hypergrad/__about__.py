"""The version, where 0.0.1 has it."""

from importlib.metadata import version

__version__ = version("hypergrad")
