"""What `backend="auto"` runs: a backend that was measured to be faster on this device, or else its default."""
