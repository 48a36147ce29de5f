"""What studies share that train arms side by side: their workspaces, the runner, their runs in MLflow, charts."""
