"""Whether the derivatives behind a hypergradient can be right.

``verification`` compares them with ``differences``; ``fingerprint`` remembers for which problems;
``dependence`` and ``moving_buffers`` look for what a derivative leaves out.
"""
