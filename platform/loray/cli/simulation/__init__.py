"""`loray simulate` and its picture."""
