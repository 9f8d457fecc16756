"""What the work begins with: an opened model, windows of text, and checks of single things."""
