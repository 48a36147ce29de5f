"""The pipeline object, its stage, export and import."""
