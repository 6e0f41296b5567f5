"""Many steps of an optimiser as one differentiable function, and what is kept of them."""
