"""What stands before every page and API of ours, whoever serves it."""
