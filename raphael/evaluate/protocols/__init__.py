"""How a number is measured, so that two numbers of one name can be compared."""
