"""The Hessian over a graph that ``torch.compile`` captured; the compiler is imported on demand."""
