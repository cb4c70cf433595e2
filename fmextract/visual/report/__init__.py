"""Write a run as one HTML page."""
