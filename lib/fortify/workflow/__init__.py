"""Plumbing of this project's own paper: profiles, publishing, pages, downloads, locks."""
