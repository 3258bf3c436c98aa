"""The project's benchmark: every way to fill static buffers, and its peers, checked and timed side by side."""
