"""What the embedded model is asked, and how well it answers."""
