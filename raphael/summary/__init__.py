"""What a model is made of, from its settings alone: shapes, parameters, FLOPs, memory, cost."""
