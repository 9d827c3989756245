"""Networks that run gated or in part."""
