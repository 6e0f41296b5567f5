"""How PyTorch is made to differentiate a user's function twice, and to leave no trace.

``evaluation`` calls an objective on fresh leaves, ``isolation`` keeps buffers and random states,
``kept_graph`` pulls vectors back through a graph that stays, ``checkpointing`` and ``attention``
make checkpoints and attention differentiable twice, ``recompute`` and ``partial`` run a function
again. ``global_state`` holds what is changed in PyTorch meanwhile, counted over threads.
"""
