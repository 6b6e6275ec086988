"""Measurements behind figures of the README."""
