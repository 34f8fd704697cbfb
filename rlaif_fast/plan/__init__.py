"""Predicts what a step takes: its code runs on the meta device, where tensors have a size but no content."""
