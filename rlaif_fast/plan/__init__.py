"""What a step takes, foretold: its code runs on the meta device, where tensors have a size and no content."""
