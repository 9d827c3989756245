"""Criteria: scores of channels by their weights, gradients or features, each with its equation and source."""
