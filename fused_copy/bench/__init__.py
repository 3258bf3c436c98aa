"""The benchmark, ``fused-copy bench``: every way to fill static buffers, checked and timed side by side."""
