"""Networks of other libraries, with their data, losses and trainers."""
