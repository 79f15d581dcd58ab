"""The paper's network: backbone, Refining Recurrent Unit, clip head, classifier, losses."""
