"""Changes of the user's network that can be taken back, and a changed copy of it for export."""
