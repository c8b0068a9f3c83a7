"""Render jobs: many sources, languages and variants -> one file for each template, resumable."""
