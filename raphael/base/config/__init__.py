"""params.yaml and presets as strict, frozen dataclasses."""
