"""What a person reads of a run: tables, figures and files."""
