"""From images to numbers, figures and the report."""
