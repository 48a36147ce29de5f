"""Stage `source`: the list of links, as LAION publishes it, and the held-out prompts."""
