"""Before a run: what it will do, every mistake, what it costs, and whether it fits."""
