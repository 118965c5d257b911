"""Gangs: the warm groups of workers in which trials of several workers run, one after another."""
