"""Tables and drawings of measured runs."""
