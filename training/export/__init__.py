"""What a trained network is taken elsewhere as: files of its features, and the network itself."""
