"""Interfaces of other libraries, each imported where it is asked for."""
