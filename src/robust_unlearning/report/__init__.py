"""Tables and figures. A report only reads what runs and evaluations left on disk."""
