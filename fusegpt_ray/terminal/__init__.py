"""What a person sees at a terminal or in a log."""
