"""Where the loop's hypergradients come from, and what each method does with θ meanwhile."""
