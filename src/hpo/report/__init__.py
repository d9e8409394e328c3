"""Pure drawing and counting: reads results, never trains, never stores."""
