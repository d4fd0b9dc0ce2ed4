"""What report.py is made of: reading a run's folders, measuring its models, drawing, and the page."""
