"""Tables and live views of the records, for the terminal. They only format; they decide nothing."""
