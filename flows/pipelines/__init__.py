"""The flows full, data, train and evaluate: DVC's stages, one Prefect task each."""
