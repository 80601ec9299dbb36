"""Pictures of bounded size that pages draw: what is in them, without HTML."""
