"""Scripts that a user reads and copies."""
