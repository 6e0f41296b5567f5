"""The Nyström method: sketches of an operator, as a solver and as a preconditioner."""
