"""Changes of the user's network that can be taken back."""
