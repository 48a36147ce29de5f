"""MLflow, behind two small classes; the only place that imports it."""
