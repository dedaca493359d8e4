"""Where work comes from: a live process (`live`), and the file that keeps one (`snapshot`)."""
