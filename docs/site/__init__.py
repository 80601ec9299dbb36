"""The program that makes the documentation's site from these pages: `make docs`."""
