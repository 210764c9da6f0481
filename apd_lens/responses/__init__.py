"""What components respond to, and what they do."""
