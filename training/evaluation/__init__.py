"""Features of tracklets, rankings by protocol, and re-ranking."""
