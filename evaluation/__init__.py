"""The parts of evaluate.py: labelled recordings, the models' features, classifiers, and results."""
