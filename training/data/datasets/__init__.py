"""Dataset readers, one module per dataset, named after it."""
