"""Everything that knows several processes."""
