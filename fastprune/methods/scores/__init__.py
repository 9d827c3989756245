"""Methods that rank channels by a score."""
