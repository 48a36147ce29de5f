"""What a fine-tuning prepares and tells before it starts, and what it shows when it is done."""
