"""The command `raphael`, one file a sub-command."""
