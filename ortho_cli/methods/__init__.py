"""What a recipe may do to a model while it trains: one method a file, wired to functions that work in any loop."""
