"""Everything that touches a site."""
