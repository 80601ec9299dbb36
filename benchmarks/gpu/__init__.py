"""Everything that needs a GPU, in one command that can be stopped and continued: parity, then figures with floors."""
