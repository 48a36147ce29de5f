"""Object stores: S3 and what speaks like it, Google's, a folder under the same rules; and what is kept of them here."""
