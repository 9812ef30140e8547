"""What a server says about itself: counts, times, metrics, logs and traces."""
