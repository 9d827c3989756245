"""GCP: global channel pruning by the scales of batch norm."""
