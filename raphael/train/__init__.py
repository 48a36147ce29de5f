"""The one loop that trains every objective, and what it leaves."""
