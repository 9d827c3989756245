"""Channel labels flow through the operator graph."""
