"""Images: fitted to a size, laid out as a grid."""
