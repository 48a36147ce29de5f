"""`raphael data verify`: whether every file below data/ and models/, and in DVC's cache, is what was written."""
