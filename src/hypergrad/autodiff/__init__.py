"""Differentiate a user's function twice, without side effects.

``evaluation`` calls an objective on fresh leaves. ``isolation`` protects buffers and random states.
``kept_graph`` pulls vectors back through a graph that is kept. ``checkpointing`` and ``attention``
make checkpoints and attention differentiable twice. ``recompute`` and ``partial`` run a function
again. ``global_state`` holds the changes to PyTorch's global state, counted over threads.
"""
