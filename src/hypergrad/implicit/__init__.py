"""Hypergradients by implicit differentiation, and a bound of their error."""
