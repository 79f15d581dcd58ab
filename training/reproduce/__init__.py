"""The rows of the paper's tables, trained and compared with its figures."""
