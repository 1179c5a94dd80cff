"""What is copied to a site and runs there; imports nothing of flctl, and nothing of flctl imports it."""
