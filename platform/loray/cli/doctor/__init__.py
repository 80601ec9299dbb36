"""`loray doctor`: checks of this machine and the deployment, each with the command that mends what it finds."""
