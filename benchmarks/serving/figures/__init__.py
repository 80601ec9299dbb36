"""From what was measured to figures: rows, floors, targets, the table and the picture."""
