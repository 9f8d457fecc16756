"""What became of a run, as one page to look at, made from its manifest or its journal."""
