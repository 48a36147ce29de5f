"""The only place that knows Prefect."""
