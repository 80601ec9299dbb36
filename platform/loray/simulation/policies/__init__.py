"""What chooses replicas, and their number: of loray, and of others that it is compared with."""
