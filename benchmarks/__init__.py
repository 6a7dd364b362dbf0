"""Speed, memory and parity; each benchmark prints one JSON line a figure."""
