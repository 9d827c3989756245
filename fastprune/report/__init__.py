"""Reports for people: tables on the terminal, figures and a page."""
