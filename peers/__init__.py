"""The same work by hypergrad and by each of its peers, side by side: `make bench-peers`."""
