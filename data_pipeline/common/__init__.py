"""What several stages share. What has one user lives with that user."""
