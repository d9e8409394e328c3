"""What the terminal shows: live display, tables, summaries."""
