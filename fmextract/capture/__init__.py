"""What to take of a forward pass, and what it means."""
