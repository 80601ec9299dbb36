"""What runs minimise, beside the cross-entropy of `loray.train.loss`."""
