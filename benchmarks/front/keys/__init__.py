"""What API keys cost: the check of one, and a flood of wrong ones beside right ones."""
