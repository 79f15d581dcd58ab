"""From tracklets to features, from features to rank-1 and mAP."""
