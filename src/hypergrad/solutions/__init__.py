"""Solutions as nodes of autograd: of a minimisation, an equation, a fixed point."""
