"""The model becomes an operator graph."""
