"""Methods that train gates on the frozen network."""
