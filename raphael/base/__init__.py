"""The ground floor: what is true of every stage, whichever model stands on it. It imports nothing from above."""
