"""Other people's code: models whose modules are swapped in place, and weights under other names."""
