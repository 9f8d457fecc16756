"""The work of one run, in order: a tournament, rounds, healing, publishing."""
