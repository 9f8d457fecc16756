"""The verbs of a terminal, grouped by what one wants. They read arguments and print; what they do
lies in the modules below.
"""
