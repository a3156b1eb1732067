"""Plumbing of this project's own paper: profiles, steps, progress, locks, publishing, pages, downloads."""
