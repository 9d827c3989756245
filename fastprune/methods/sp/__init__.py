"""SP: search of stage widths in a super-net; AutoSlim."""
