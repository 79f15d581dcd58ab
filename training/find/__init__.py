"""Find a person in a video: boxes, tracks, features, ranking, and the pictures of what was found."""
