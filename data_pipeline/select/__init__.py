"""Stage `select`: rows that are worth a request."""
