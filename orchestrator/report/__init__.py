"""What a person sees: tables and live views of the records. No logic."""
