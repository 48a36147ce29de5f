"""A trained pipeline in other programs' forms and back: `raphael export`, `raphael import`, `from_pretrained`."""
