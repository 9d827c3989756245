"""Convolutions: the kernels that compute them, which one computes what, and layers that keep packed weights."""
