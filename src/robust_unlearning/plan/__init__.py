"""What a run would cost, told before anything is loaded: bytes to read, memory, FLOPs, seconds, disk."""
