"""SP, which searches the widths of stages in a super-net, and AutoSlim."""
