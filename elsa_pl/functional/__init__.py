"""The mathematics: tensors and numbers in, tensors out, no trainer and no peers."""
