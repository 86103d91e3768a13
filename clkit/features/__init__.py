"""What a batch shows: inputs and targets, features and logits, read once for all parts of a trainer."""
