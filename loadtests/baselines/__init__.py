"""What a user would serve the same model with instead, as short as each tool's own examples."""
