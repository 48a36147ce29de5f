"""A system for tests: two small trainings, the second of which needs the first."""
