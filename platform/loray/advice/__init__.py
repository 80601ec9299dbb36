"""Which method to train with: the score card that people know, and beside it what each would cost here."""
