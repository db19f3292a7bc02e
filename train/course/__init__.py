"""The mini-course that makes the embedded nano model: its data, phases and report."""
