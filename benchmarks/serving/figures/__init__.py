"""Figures computed from measurements: rows, floors, targets, the table and the picture."""
