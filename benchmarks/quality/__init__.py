"""What runs learn, beside how fast they are."""
