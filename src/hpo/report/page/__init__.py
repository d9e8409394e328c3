"""The page of a study: everything that is known of it, in one HTML file that needs no network."""
