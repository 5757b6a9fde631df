"""Rows of files and of data sets of the hub, each with its place: read, made into text, counted where they are bad."""
