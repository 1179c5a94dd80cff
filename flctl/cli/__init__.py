"""What the user types and what the user reads; one module per noun, no decisions."""
